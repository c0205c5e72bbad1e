"""What each JWT test ID of the public conformance suite demands: where the standards say so, and what.

Sections: JS = JWT-SVID, TB = Trust Domain and Bundle, WA = Workload API.
"""

from __future__ import annotations

JWT_CLAUSES: dict[str, tuple[str, str]] = {
    "JV-1": ("JS 4, WA 6.3", "a valid token is accepted and its subject is the identity"),
    "JV-2": ("JS 2.1", "each algorithm of the list is accepted"),
    "JV-3": ("JS 2.1", "a token with algorithm none is refused"),
    "JV-4": ("JS 2.1", "HMAC is refused, also keyed with a public key of the bundle"),
    "JV-5": ("JS 2.1", "a signature outside the list is refused, although its key is in the bundle"),
    "JV-6": ("JS 4; RFC 7518 3.4", "an algorithm that is not the key's is refused"),
    "JV-7": ("JS 3.2", "a token without audience is refused"),
    "JV-8": ("JS 3.2", "a token for another audience is refused"),
    "JV-9": ("JS 3.2", "a token for several audiences is accepted by each"),
    "JV-10": ("JS 4; RFC 7519 4.1.3", "an audience that is a single string is accepted"),
    "JV-11": ("JS 3.3", "a token without expiry is refused"),
    "JV-12": ("JS 3.3", "an expired token is refused"),
    "JV-13": ("JS 4; RFC 7519 4.1.5", "a token that is not valid yet is refused"),
    "JV-14": ("JS 4", "a changed signature is refused"),
    "JV-15": ("JS 4", "a changed payload is refused"),
    "JV-16": ("JS 4, WA 6.3", "a signature by a key outside the bundle is refused"),
    "JV-17": ("WA 6.3", "a key of one trust domain does not vouch for a subject of another"),
    "JV-18": ("WA 6.3", "a subject whose trust domain has no bundle is refused"),
    "JV-19": ("JS 3.1", "a subject that is no SPIFFE ID of a workload is refused"),
    "JV-20": ("JS 2.3", "type JWT, JOSE or none at all is accepted"),
    "JV-21": ("JS 2.3", "any other type is refused"),
    "JV-22": ("JS 2.2", "a token without key ID is accepted"),
    "JV-23": ("JS 2, JS 4; RFC 7515 4.1.11", "a critical header that is not known is refused"),
    "JV-24": ("JS 5.1", "JSON serialization is refused"),
    "JV-25": ("JS 5.1", "what is no compact token is refused"),
    "JB-1": ("WA 4.3", "a key that an update brings is used"),
    "JB-2": ("WA 4.4", "a key that an update leaves out is not used any more"),
    "JB-3": ("WA 4.4, 6.2.2", "a trust domain that an update leaves out is not trusted any more"),
    "JB-4": ("JS 6.2; RFC 7515 4.1.4", "the key is chosen by its ID"),
    "JB-5": ("JS 6.2, TB 4.2.2", "keys of another use are ignored, the others work on"),
    "JB-6": ("TB 4.1.3, 4.2.1", "keys of an unknown type are ignored, the others work on"),
    "JB-7": ("TB 4.1.3", "a bundle without keys trusts nothing"),
    "JB-8": ("WA 6.2.2, 6.3", "a federated trust domain's token is accepted by that domain's bundle"),
    "JF-1": ("WA 6.2.1", "the audience is asked for, and the agent's token is what comes back"),
    "JF-2": ("WA 6.2.1", "several audiences are asked for unchanged"),
    "JF-3": ("WA 6.2.1", "an identity that is asked for is passed on, and its token comes back"),
    "JF-4": ("WA 6.2.1", "a denial is an error, although an older token is still valid"),
}
