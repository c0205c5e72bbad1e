"""Every object of the manifests that this cluster does not run passes its API server all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.k8s.cluster import ROOT
from ztdev.kubernetes.kubectl import kubectl, rendered

FOLDERS = ("k8s/overlays/eks", "k8s/spire/csi")

OBJECTS = {
    f"{folder} {each['kind']} {each['metadata']['name']}": each
    for folder in FOLDERS
    for each in rendered(ROOT / folder)
    if each["kind"] not in ("CustomResourceDefinition", "Namespace")  # they are on the cluster
}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_api_server_takes_it(name: str) -> None:
    """Under another name, since some of that name is there."""
    document = json.loads(json.dumps(OBJECTS[name]))
    document["metadata"]["name"] = f"tried-{document['metadata']['name']}"
    said = kubectl(
        *("create", "--dry-run=server", "--validate=strict", "--filename=-", "--output=name"),
        given=json.dumps(document),
    )
    assert "tried-" in said


def test_there_is_something_to_try() -> None:
    assert {Path(name.split()[0]) for name in OBJECTS} == {Path(folder) for folder in FOLDERS}
