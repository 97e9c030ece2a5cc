"""The doctor and the watchdog's verdict: what they make of what they find."""

from __future__ import annotations

import copy
import threading

import pytest

from conftest import est_ds
from est_ds.doctor.checks import Node, find
from est_ds.doctor.facts import collect
from est_ds.ranks.verdict import Record, is_broken_connection, verdict, where_main_is

GPU = {
    "name": "NVIDIA H200", "total_bytes": 140 * 10**9, "free_bytes": 139 * 10**9,
    "flops": 700e12, "error": None, "health": ["40", "0", "No", "No", "Not Active"],
}  # fmt: skip
NETWORK = {
    "all_reduce": 1e10, "bandwidth": 1e10, "latency_s": 1e-5, "skew_s": 0.0, "shares": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def facts(tiny_run, tmp_path_factory):
    """Those of this machine, as if it had eight GPUs."""
    run_dir = tmp_path_factory.mktemp("doctor") / "run"
    found = collect(str(tiny_run), [f"run_dir={run_dir}"])
    assert not run_dir.exists()
    return found | {"gpus": [dict(GPU) for _ in range(8)], "shm_bytes": 16 * 2**30}


def nodes(facts):
    return [
        Node(name, 8, copy.deepcopy(facts), network=copy.deepcopy(NETWORK)) for name in ("a", "b")
    ]


def test_equal_nodes_have_nothing_wrong(facts):
    assert find(nodes(facts)) == []


def change(node, path, value):
    *parents, last = path
    for part in parents:
        node = getattr(node, part) if isinstance(node, Node) else node[part]
    node[last] = value


@pytest.mark.parametrize(
    "path, value, fails, said",
    [
        (("facts", "versions", "torch"), "9.9", True, "torch is 9.9"),
        (("facts", "versions", "est_ds"), "0.1.0 (00000000)", True, "est_ds is"),
        (("facts", "cuda"), "11.8", True, "cuda is 11.8"),
        (("facts", "driver"), "1.0", False, "driver is 1.0"),
        (("facts", "gpus"), [], True, "has 0 GPUs"),
        (("facts", "gpus"), [dict(GPU)] * 7, True, "7 GPUs for slots=8"),
        (("facts", "gpus", 3, "name"), "Tesla T4", False, "GPU 3 is Tesla T4"),
        (("facts", "gpus", 3, "free_bytes"), 10**9, False, "1 GB of 140 GB free"),
        (("facts", "gpus", 3, "flops"), 100e12, False, "100 TFLOP/s"),
        (("facts", "gpus", 3, "error"), "fell off the bus", True, "fell off"),
        (("facts", "gpus", 3, "health"), ["40", "7", "No", "No", "No"], True, "7 uncorrected"),
        (("facts", "gpus", 3, "health"), ["93", "0", "No", "No", "Active"], False, "93 C"),
        (("facts", "run", "config"), "0" * 16, True, "the run file differs"),
        (("facts", "run", "corpus", "train"), "0" * 16, True, "another corpus"),
        (("facts", "run", "free_bytes"), 10, True, "a checkpoint takes"),
        (("facts", "run", "writable"), False, True, "cannot be written"),
        (("facts", "run"), {"error": "data.train is missing"}, True, "data.train is missing"),
        (("facts", "shm_bytes"), 64 * 2**20, True, "/dev/shm"),
        (("facts", "unreachable"), {"a": "Permission denied"}, False, "ssh to a"),
        (("network", "skew_s"), 30.0, False, "+30.0 s"),
        (("network", "shares"), False, True, "not the same folder"),
    ],
)
def test_every_fault_is_found_on_its_node_and_only_there(path, value, fails, said, facts):
    both = nodes(facts)
    change(both[1], path, value)
    [finding] = find(both)
    assert finding.node == "b" and finding.fails == fails and said in finding.what
    assert finding.mend or said == "data.train is missing"


def test_node_that_does_not_answer_fails(facts):
    [finding] = find([nodes(facts)[0], Node("b", 8, error="ssh: no route")])
    assert finding.node == "b" and finding.fails and "no route" in finding.what


def test_doctor_of_this_machine_ends_0_and_of_a_broken_run_2(tiny_run, tmp_path):
    well = est_ds("doctor", tiny_run, f"run_dir={tmp_path}/run")
    assert well.returncode == 0 and "nothing is wrong" in well.stdout, well.stdout + well.stderr
    broken = est_ds("doctor", tiny_run, f"run_dir={tmp_path}/run", f"data.train={tmp_path}/none")
    assert broken.returncode == 2 and "FAILS" in broken.stdout
    assert list(tmp_path.iterdir()) == []


def record(done, **more):
    return Record(done, "training", **more)


def test_verdict_names_the_process_that_does_not_answer():
    reports = {0: record(7), 1: record(7), 3: record(7)}
    text = verdict(
        "the connection broke.", ["a", "a", "b", "b"].__getitem__, reports, [2], {2: record(6)}
    )
    assert "rank 2 on b (last step 6, training) does not answer" in text
    assert "3 others waited for it, at step 7" in text and "rank 3" not in text


def test_verdict_names_the_process_that_is_held_up_or_behind():
    reports = {0: record(7), 1: record(7, where="loader.py:3 (read)")}
    assert "rank 1 on b (last step 7, training) is held up at loader.py:3" in verdict(
        "no progress.", ["a", "b"].__getitem__, reports, [], {}
    )
    reports = {0: record(8), 1: record(7)}
    assert "rank 1 on b" in verdict("no progress.", ["a", "b"].__getitem__, reports, [], {})


def test_verdict_names_the_error_before_those_who_went_with_it():
    reports = {0: record(7), 1: record(7, error="OSError: disk full")}
    text = verdict("rank 1 on b failed.", ["a", "b", "c"].__getitem__, reports, [2], {})
    assert "rank 1 on b (last step 7, training) failed: OSError: disk full" in text
    assert "rank 2" not in text


def test_place_of_a_thread_is_its_line_and_errors_are_told_from_broken_connections():
    begun, end = threading.Event(), threading.Event()

    def hang():
        begun.set()
        while not end.is_set():
            pass

    thread = threading.Thread(target=hang)
    thread.start()
    begun.wait()
    try:
        assert where_main_is(thread.ident).endswith(("(hang)", "(is_set)"))
    finally:
        end.set()
    assert is_broken_connection(RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:5"))
    assert not is_broken_connection(RuntimeError("CUDA out of memory"))
    assert not is_broken_connection(OSError("No space left on device"))
