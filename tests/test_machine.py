"""What the test cluster's machines see of this one."""

import tempfile
from pathlib import Path

from tests.support.cluster import below_tmp


def test_a_checkout_below_tmp_is_seen_with_its_python_and_the_clusters_directory() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        top = Path(name).resolve()
        checkout, python, link = top / "adm", top / "python", top / "adm" / ".venv"
        for place in (checkout / "pytest" / "cluster0", python / "lib"):
            place.mkdir(parents=True)
        link.symlink_to(python)
        places = [checkout / "pytest" / "cluster0", checkout, link, python / "lib", "/usr", "/tmp"]
        assert below_tmp(places) == [str(checkout), str(python)]
