"""The demo on EKS, made by one command and taken away by another: `python -m ztdev.eks`."""
