"""What each JWT test ID of the SPIFFE conformance catalogue demands, and where the standards say so.

JS: JWT-SVID. TB: Trust Domain and Bundle. WA: Workload API.
"""

from __future__ import annotations

JWT_CLAUSES: dict[str, str] = {
    "JV-1": "A valid token is accepted and its subject is the identity (JS 4, WA 6.3)",
    "JV-2": "Each algorithm of the list is accepted (JS 2.1)",
    "JV-3": "A token with algorithm none is refused (JS 2.1)",
    "JV-4": "HMAC is refused, also keyed with a public key of the bundle (JS 2.1)",
    "JV-5": "A signature outside the list is refused, although its key is in the bundle (JS 2.1)",
    "JV-6": "An algorithm that is not the key's is refused (JS 4; RFC 7518 3.4)",
    "JV-7": "A token without audience is refused (JS 3.2)",
    "JV-8": "A token for another audience is refused (JS 3.2)",
    "JV-9": "A token for several audiences is accepted by each (JS 3.2)",
    "JV-10": "An audience that is a single string is accepted (JS 4; RFC 7519 4.1.3)",
    "JV-11": "A token without expiry is refused (JS 3.3)",
    "JV-12": "An expired token is refused (JS 3.3)",
    "JV-13": "A token that is not valid yet is refused (JS 4; RFC 7519 4.1.5)",
    "JV-14": "A changed signature is refused (JS 4)",
    "JV-15": "A changed payload is refused (JS 4)",
    "JV-16": "A signature by a key outside the bundle is refused (JS 4, WA 6.3)",
    "JV-17": "A key of one trust domain does not vouch for a subject of another (WA 6.3)",
    "JV-18": "A subject whose trust domain has no bundle is refused (WA 6.3)",
    "JV-19": "A subject that is no SPIFFE ID of a workload is refused (JS 3.1)",
    "JV-20": "Type JWT, JOSE or none at all is accepted (JS 2.3)",
    "JV-21": "Any other type is refused (JS 2.3)",
    "JV-22": "A token without key ID is accepted (JS 2.2)",
    "JV-23": "A critical header that is not known is refused (JS 2, JS 4; RFC 7515 4.1.11)",
    "JV-24": "JSON serialization is refused (JS 5.1)",
    "JV-25": "What is no compact token is refused (JS 5.1)",
    "JB-1": "A key that an update brings is used (WA 4.3)",
    "JB-2": "A key that an update leaves out is not used any more (WA 4.4)",
    "JB-3": "A trust domain that an update leaves out is not trusted any more (WA 4.4, 6.2.2)",
    "JB-4": "The key is chosen by its ID (JS 6.2; RFC 7515 4.1.4)",
    "JB-5": "Keys of another use are ignored, the others work on (JS 6.2, TB 4.2.2)",
    "JB-6": "Keys of an unknown type are ignored, the others work on (TB 4.1.3, 4.2.1)",
    "JB-7": "A bundle without keys trusts nothing (TB 4.1.3)",
    "JB-8": "A federated trust domain's token is accepted by that domain's bundle (WA 6.2.2, 6.3)",
    "JF-1": "The audience is asked for, and the agent's token is what comes back (WA 6.2.1)",
    "JF-2": "Several audiences are asked for unchanged (WA 6.2.1)",
    "JF-3": "An identity that is asked for is passed on, and its token comes back (WA 6.2.1)",
    "JF-4": "A denial is an error, although an older token is still valid (WA 6.2.1)",
}
