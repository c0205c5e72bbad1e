"""The development side of docker-compose.yml: what its containers run that are no service and no product.

certificates   once: the database's certificate, and the node's for SPIRE
registrar      keeps SPIRE's registration entries as they should be
cloud          the local AWS, the logins of the databases, and their rotation
rotate         asks `cloud` for a rotation now
"""
