"""What containers run that are no service and no product, in docker compose and in k8s/overlays/local.

certificates   once: the database's certificate, and the node's for SPIRE
registrar      keeps SPIRE's registration entries as they should be
cloud          the local AWS, the logins of the databases, and their rotation
databases      once: the roles in databases that somebody else runs, on EKS
rotate         asks `cloud` for a rotation now
"""
