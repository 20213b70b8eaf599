"""The protocol and the device's agent run where torch and the other halves are not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from device_imports import faults

BLOCKED = ("torch", "transformers", "hosl_cloud", "hosl_export")

SCRIPT = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
package = importlib.import_module({module!r})
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if ".lib" not in found.name:  # the kernel is a library for ctypes
        importlib.import_module(found.name)
print(*sorted(set(sys.modules) & set({blocked!r})))
"""


def import_alone(module):
    script = SCRIPT.format(blocked=BLOCKED, module=module)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["hosl_protocol", "hosl_edge"])
def test_every_module_imports_with_torch_and_the_other_halves_blocked(module):
    done = import_alone(module)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", BLOCKED)
def test_the_blocker_blocks(module):
    done = import_alone(module)
    assert done.returncode == 1
    assert f"ImportError: {module} is blocked" in done.stderr


def test_a_test_of_the_device_may_not_import_the_cloud_itself_or_through_a_helper(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text("from support import free_port\n\n\ndef test_later():\n    import torch\n")
    assert list(faults([path])) == []
    for line, culprit in (("import torch", path.name), ("from services import serving", "services.py")):
        path.write_text(f"{line}\n")
        assert any(f"{culprit}:" in fault for fault in faults([path]))
    path.write_text("def test_later():\n    from hosl_cloud import settings\n")
    assert list(faults([path])) == [f"{path}:2: imports hosl_cloud, which no device has"]
    path.write_text("def test_later():\n    from services import serving\n")
    assert any("services.py:" in fault for fault in faults([path])), "of the cloud not even later"
    path.write_text("def test_later():\n    from tracing import write_graph_once\n")
    assert list(faults([path])) == []
    path.write_text("from tracing import write_graph_once\n")
    assert any("tracing.py:" in fault for fault in faults([path]))
