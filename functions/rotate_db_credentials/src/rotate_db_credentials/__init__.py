"""The Secrets Manager rotation function for PostgreSQL logins, by the alternating-users strategy.

`handler` is what Lambda calls, `rotation` the four steps, `secret` what a database secret must hold,
`database` the three things that are done in PostgreSQL, `failure` the reasons why a step ends.
"""
