"""AWS on one machine: an OIDC issuer, a gate that verifies web identity tokens, and the workload stack in it.

`issuer` plays the cluster's OIDC issuer and the kubelet's projected token files, `cloud` starts and stops the
stand-in for AWS and deploys infra/workload.yaml into it, `gate` is the program it runs (in an environment of
its own, made by `environment`). README.md says what this proves and what it does not.
"""
