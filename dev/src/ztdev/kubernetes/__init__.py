"""What the manifests below k8s/ say, read without a cluster."""
