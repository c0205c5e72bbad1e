# What stands for the image of SPIRE's controller manager where no registry is reached: the same program.
FROM scratch
COPY cmd /spire-controller-manager
USER 10001:10001
ENTRYPOINT ["/spire-controller-manager"]
