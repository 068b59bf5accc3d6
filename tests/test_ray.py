"""A merge on a Ray cluster: the folder of a local merge, whoever dies meanwhile, and one line for what is wrong."""

from __future__ import annotations

import ray_tools  # before Ray, which it tells where to listen

# isort: split
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from hub_tools import cli, content
from ray_tools import NODE, PACKAGE, PATIENCE, Scene, command, is_over, meanwhile
from safetensors.torch import load_file, save_file

import fossil_export
from fossil_export import Progress, merge_on_ray, plan_merge
from fossil_export.clusters import _tasks, _worker
from fossil_export.clusters._asked import asked_for
from fossil_export.clusters._board import Reached
from fossil_export.clusters._connection import connected
from fossil_export.clusters._merge import run_on_ray
from fossil_export.errors import ClusterError, MergeError

joined = ray_tools.joined
scene = ray_tools.scene


def test_a_worker_that_is_killed_in_the_middle_does_not_show(scene: Scene, tmp_path: Path) -> None:
    scene.hold()
    process = command(scene, tmp_path / "out", "--ray", scene.address)
    os.kill(scene.at_work(), signal.SIGKILL)
    scene.go()
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    found = json.loads(out)
    assert out.count("\n") == 1 and found["ray"]["again"] >= 1 and found["ray"]["nodes"] == 2
    assert content(tmp_path / "out") == content(scene.local)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_node_that_goes_away_in_the_middle_does_not_show(joined: Scene, tmp_path: Path) -> None:
    node = joined.cluster.add_node(node_ip_address="127.0.0.3", **NODE)
    raylet = node.all_processes["raylet"][0].process.pid
    told: list[Progress] = []

    def remove() -> None:
        worker = joined.at_work(raylet)
        joined.cluster.remove_node(node, allow_graceful=False)
        assert is_over(worker)
        joined.go()

    joined.hold()
    thread = meanwhile(remove)
    result = merge_on_ray(joined.adapter, tmp_path / "out", base=joined.base, progress=told.append)
    thread.join()
    assert content(tmp_path / "out") == content(joined.local)
    said = [one.note for one in told if one.note]
    assert said[0].startswith("Ray cluster at 127.0.0.1:") and any("made again" in line for line in said)
    merged = [one.done for one in told if one.step == "merging"]
    assert merged == sorted(merged) and merged[-1] == told[-1].total == sum(one.nbytes for one in result.plan.tensors)


def test_ctrl_c_ends_all_tasks_and_leaves_what_the_next_run_takes_up(joined: Scene, tmp_path: Path) -> None:
    joined.hold(after=2)
    process = command(joined, tmp_path / "out", "--ray", joined.address)
    worker = joined.at_work()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "Aborted!\n")
    assert is_over(worker) and not (tmp_path / "out").exists()
    joined.go()
    result = merge_on_ray(joined.adapter, tmp_path / "out", base=joined.base)
    assert result.resumed >= 2 and content(tmp_path / "out") == content(joined.local)


def test_a_worker_with_another_version_is_refused(
    joined: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tasks, "__version__", "99.0")
    with pytest.raises(ClusterError) as caught:
        merge_on_ray(joined.adapter, tmp_path / "out", base=joined.base)
    version = fossil_export.__version__
    assert str(caught.value).partition(" (127.0.0.")[2][1:] == (
        f"): has fossil-export {version}, and this machine 99.0; install the same there: "
        "pip install 'fossil-export[ray]==99.0'"
    )


def test_a_worker_that_sees_another_base_is_refused(joined: Scene, tmp_path: Path) -> None:
    shutil.copytree(joined.base, tmp_path / "base")
    plan = plan_merge(joined.adapter, joined.base)
    asked = asked_for(joined.adapter, tmp_path / "base", None, {})
    with pytest.raises(
        ClusterError, match=r"^node .* \(127.0.0.[12]\): makes another merge of this \(base .*/base .*, here"
    ):
        run_on_ray(plan, asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_made_where_there_is_room(joined: Scene, tmp_path: Path) -> None:
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    told: list[Progress] = []
    (joined.held / "full").write_text(nodes[0])
    merge_on_ray(joined.adapter, tmp_path / "out", base=joined.base, progress=told.append)
    assert content(tmp_path / "out") == content(joined.local)
    assert any("has no room for it; made elsewhere" in one.note for one in told)
    (joined.held / "full").write_text(" ".join(nodes))
    line = "no worker has room for the 5,000 bytes of the base that it is made of; the most is 1,000 free in /disk on"
    with pytest.raises(ClusterError, match=line):
        merge_on_ray(joined.adapter, tmp_path / "other", base=joined.base)


def test_what_a_worker_refuses_is_one_line(joined: Scene, tmp_path: Path) -> None:
    base = shutil.copytree(joined.base, tmp_path / "base")
    file = base / "model-00003-of-00007.safetensors"
    tensors = load_file(file)
    for values in tensors.values():
        values.view(-1)[0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"^[^\n]*weight[^\n]* \(on the node [^\n]* \(127\.0\.0\.[12]\)\)$"):
        merge_on_ray(joined.adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_worker_does_not_see_is_told(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fossil_export.merging._memory.THREADS", 12)  # a worker has what it is given, for good
    asked = asked_for(scene.adapter, scene.base, None, {})
    digest = _worker.plan_digest(asked.plan()).digest
    order = _worker.Order(asked, str(tmp_path / "out"), digest, "cpu", False, 2)
    name = plan_merge(scene.adapter, scene.base).files[0].name
    found = _worker.make(order, name, 1, None, "")
    assert found["refused"] == "OutputError"
    assert found["line"] == (
        f"{tmp_path / 'out'}: what the merge began there is not to be seen; name a folder that all nodes share, or a "
        "place in an object store"
    )


def test_a_cluster_of_its_own_runs_no_code_of_the_current_folder(scene: Scene, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("fossil_export", "numpy", "ml_dtypes", "yaml", "tqdm", "threadpoolctl", "huggingface_hub", "ctypes"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(3)\n")
    code = (
        "import sys; from fossil_export import merge_on_ray; tell = lambda now: now.note and print(now.note); "
        f"merge_on_ray({str(scene.adapter)!r}, 'out', base={str(scene.base)!r}, progress=tell)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONSAFEPATH": "1", "HOME": str(tmp_path)}
    environment |= {"RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled"}
    arguments = (
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-I", "-c", code]
    )
    done = subprocess.run(arguments, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in (
        "Ray on this machine alone, as no cluster runs here (see --ray)\n",
        f"Ray cluster at {scene.address}, 2 nodes\n",
    )
    assert content(here / "out") == content(scene.local)


def test_without_ray_the_extra_is_named(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ("merge", scene.adapter, "--base", scene.base, "-o", tmp_path / "out", "--ray", "auto")
    said = cli(*arguments, code=1).stderr
    assert said.startswith("error: merging on a Ray cluster needs ray: ")
    assert said.endswith(" install 'fossil-export[ray]'\n") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_one_line(scene: Scene, tmp_path: Path) -> None:
    ray.shutdown()
    result = cli("merge", scene.adapter, "--base", scene.base, "-o", tmp_path / "out", "--ray", "127.0.0.1:1", code=1)
    assert result.output == (
        "error: 127.0.0.1:1: no Ray cluster answers there; start one (ray start --head), or say --ray local\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_client_that_an_address_wants_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **options: Any) -> None:
        raise ImportError("Ray Client requires pip package `ray[client]`.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(
            ClusterError, match=r"ray://head:10001: Ray's client is not installed.*pip install 'ray\[client\]'"
        ),
        connected("ray://head:10001"),
    ):
        pass


def test_ray_is_imported_for_ray_alone(scene: Scene, tmp_path: Path) -> None:
    code = (
        f"import sys, fossil_export; fossil_export.merge({str(scene.adapter)!r}, {str(tmp_path / 'out')!r}, "
        f"base={str(scene.base)!r}); import fossil_export.commands._merge; assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})


def test_this_process_keeps_its_signals_and_its_environment(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", scene.address)
    before = dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with connected("auto") as connection:
        assert (connection.address, connection.is_own, connection.is_new) == (scene.address, True, False)
        assert signal.getsignal(signal.SIGTERM) is before[1]
    assert not ray.is_initialized()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_bar_never_goes_back() -> None:
    written: list[int] = []
    progress = Reached(written.append)
    reports: list[dict[str, Any]] = [{"a": (1, "n", 50)}, {"a": (2, "m", 0)}, {"a": (2, "m", 30)}, {"a": (2, "m", 70)}]
    for report in reports:
        progress.seen(report)
    progress.reached("a", 100)
    assert written == [50, 20, 30] and progress.nodes == {("a", 1): "n", ("a", 2): "m"}
