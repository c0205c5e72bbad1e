"""Programs that run inside a container of a service, by its Python, and print what they saw as JSON."""

from __future__ import annotations

#: The Python of the services' images.
PYTHON = "/opt/zt/bin/python"

#: Connects to every address that standard input lists (pairs of host and port), and says of each
#: ``connected``; ``refused`` when somebody is there and does not listen, or a firewall says no;
#: ``unreachable`` when there was no answer, or no way.
CONNECT = """
import concurrent.futures, json, socket, sys
def outcome(address):
    try:
        socket.create_connection(address, timeout=2).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "unreachable"
    return "connected"
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(outcome, map(tuple, json.load(sys.stdin))))))
"""

#: Asks for the address of every name that standard input lists, and says of each ``known``; ``unknown`` when
#: a name server says so; ``unanswered`` when none answers.
RESOLVE = """
import concurrent.futures, json, os, socket, sys
os.environ["RES_OPTIONS"] = "timeout:2 attempts:1"
def outcome(name):
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror as error:
        return "unknown" if error.errno == socket.EAI_NONAME else "unanswered"
    return "known"
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(outcome, json.load(sys.stdin)))))
"""

#: Asks for an identity until it has one, and makes the calls of payments that standard input lists (pairs of
#: method and path); or tells that there is no identity to be had. `id` is ours, `answers` holds status and
#: reason of each.
CALL_PAYMENTS = """
import asyncio, json, sys
from ztmtls.client import AsyncClient
from ztmtls.source import NoIdentity, X509Source
async def main():
    async with X509Source("unix:///spiffe-workload-api/spire-agent.sock") as source:
        try:
            await source.ready(20)
        except NoIdentity as none:
            return {"id": None, "reason": str(none.reason)}
        peer = "spiffe://zt.example/ns/zt-demo/sa/payments"
        async with AsyncClient(source, peer=peer, base_url="https://payments.zt-demo:8443") as client:
            answers = [await client.request(method, path) for method, path in json.load(sys.stdin)]
        told = [[answer.status_code, answer.json().get("reason")] for answer in answers]
        return {"id": str(source.context.svid.id), "answers": told}
print(json.dumps(asyncio.run(main())))
"""

#: Reads each secret that standard input lists, with whatever role AWS gives it here: ``read``, or AWS's code.
READ_SECRETS = """
import json, os, sys
import boto3
from botocore.exceptions import ClientError
client = boto3.client("secretsmanager", region_name=os.environ["AWS_REGION"])
def outcome(name):
    try:
        client.get_secret_value(SecretId=name)
    except ClientError as error:
        return error.response["Error"]["Code"]
    return "read"
print(json.dumps([outcome(name) for name in json.load(sys.stdin)]))
"""

#: A JWT-SVID of whoever runs it, for the audience that standard input names.
FETCH_JWT_SVID = """
import json, sys
from ztmtls.jwt_source import fetch_once
endpoint = "unix:///spiffe-workload-api/spire-agent.sock"
print(json.dumps(fetch_once(endpoint, json.load(sys.stdin), timeout=20).token))
"""
