# What stands for the image of SPIRE's OIDC discovery provider where no registry is reached: the same program.
FROM ghcr.io/spiffe/spire-agent:1.13.3
COPY oidc-discovery-provider /opt/spire/bin/oidc-discovery-provider
USER 10001:10001
ENTRYPOINT ["/opt/spire/bin/oidc-discovery-provider"]
