"""A run begins with published weights (`model.from`), in every layout alike."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cases.families import CASES
from cases.tiny import TINY_MODEL
from conftest import refused
from est_ds.checkpoints.reader import Checkpoint
from est_ds.checkpoints.resume import load_weights
from est_ds.config import published as published_weights
from est_ds.config.run_file import load_run
from est_ds.cost.states import Process, held
from est_ds.data.loader import Portion
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from est_ds.slicing.build import build_model
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.weights import Weights
from est_ds.training.branch import branch
from exports import MODELS
from forks import fork, wait
from layouts import train_in
from publishing import Hub, publish
from reference import assert_close, loss_of, plain_adamw
from workers import ROOT, launched, train_all

LLAMA = {**TINY_MODEL, "hidden_size": 32, "num_key_value_heads": 8}
PUBLISHED = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 4, "n_head": 4,
        "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip
SHORT = ["steps=4", "method={name: full}", "evaluate={every: 4, sequences: 4}"]
SHORT += ["checkpoint={every: 2, keep_last: 0}", "optimizer={lr: 0.01}"]
LAYOUTS = (
    "1 process",
    "data 2, ZeRO 0",
    "data 2, ZeRO 1",
    "data 2, ZeRO 2",
    "data 2, ZeRO 3",
    "pipe 2, ZeRO 0",
    "pipe 2 x data 2, ZeRO 1",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    many = {"max_shard_size": "40KB"}
    made = {name: publish(folder / name, one, **many) for name, one in PUBLISHED.items()}
    assert all(len(list(one.glob("*.safetensors"))) > 2 for one in made.values())
    return made


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)[0]]


def check_continuity(runs: list[Path]) -> None:
    """The first loss is the library's on the same batch, and the run goes on as plain AdamW."""
    config = load_run(runs[0])
    plain = plain_adamw(config.model_copy(update={"run_dir": f"{runs[0]}/none"}))
    for run in runs:
        assert losses(run)[0] == pytest.approx(plain.losses[0], rel=1e-6), run
        assert_close(losses(run), plain.losses)


def test_run_under_zero_3_begins_with_tied_weights(published, synthetic_run, tmp_path):
    begin = [*SHORT, f"model.from={published['qwen3']}"]
    check_continuity(train_in(tmp_path, synthetic_run, [("data 2, ZeRO 3", "qwen3", begin)]))


@pytest.mark.parametrize("family", PUBLISHED)
def test_first_model_is_the_published_one(family, published, synthetic_run):
    begin = [*SHORT, f"model.from={published[family]}"]
    found = make_design(load_run(synthetic_run, begin)).first_model().state_dict()
    auto = transformers.AutoModelForCausalLM.from_pretrained(published[family], dtype="float32")
    expected = auto.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.slow
def test_run_that_has_begun_needs_the_folder_no_more(published, synthetic_run, tmp_path):
    """It was killed in its first step, and goes on by its run file in another layout."""
    folder = shutil.copytree(published["llama"], tmp_path / "published")
    begin = [*SHORT, f"model.from={folder}"]
    [run] = train_in(tmp_path, synthetic_run, [("data 2, ZeRO 3", "gone", begin)])
    once = losses(run)
    shutil.rmtree(folder)
    branch(str(run), "2", str(tmp_path / "branch"), ["schedule={name: wsd, decay: 0.5}"])
    assert load_run(tmp_path / "branch").model == load_run(run).model
    for step in ("00000002", "00000004"):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    (run / "checkpoints" / "latest").write_text("step_00000000\n")
    again = [f"run_dir={run}", *begin, "parallel={pipe: 1, zero: 0}"]
    train_all(tmp_path / "again", 1, [{"run": synthetic_run, "overrides": again}])
    assert_close(losses(run), once)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layout_goes_on_from_published_weights(name, published, synthetic_run, tmp_path):
    begin = [*SHORT, f"model.from={published[name]}"]
    check_continuity(train_in(tmp_path, synthetic_run, [(one, name, begin) for one in LAYOUTS]))


OTHERS = {"bert": "mlm", "t5": "ul2", "mamba": "causal"}  # with their objectives


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_go_on_from_published_weights(name, tiny_run, tmp_path):
    folder = publish(tmp_path / "published", MODELS[name], max_shard_size="40KB")
    begin = [
        *SHORT,
        f"objective={{name: {OTHERS[name]}}}",
        f"model.from={folder}",
        "data.sequence=32",
    ]
    layouts = ("1 process", "data 2, ZeRO 3", "data 2, ZeRO 2, offload", "pipe 2, ZeRO 1")
    check_continuity(train_in(tmp_path, tiny_run, [(one, name, begin) for one in layouts]))


def stored_otherwise(folder: Path, change) -> None:
    """Writes a folder's one file anew, with the names and tensors that `change` makes of them."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.clone() for k, v in change(tensors).items()}
    save_file(tensors, folder / "model.safetensors")


def without_prefix(prefix: str, **more: torch.Tensor):
    return lambda held: {k.removeprefix(prefix): v for k, v in held.items()} | more


def as_first_bert(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As bert-base-uncased is stored."""
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name, former in older.items():
        held = {k.replace(name, former): v for k, v in held.items()}
    return held | {"bert.pooler.dense.bias": torch.ones(3), "cls.seq_relationship.bias": held[
        "cls.predictions.bias"]}  # fmt: skip


STORED = {
    "llama": None,
    "llama_biases_tied": None,
    "qwen3": None,
    "gpt2": without_prefix("transformer.", **{"h.0.attn.bias": torch.ones(1, 1, 4, 4)}),
    "bert": as_first_bert,
    "t5": None,
    "t5_gated": None,
    "mamba": None,
}


@pytest.mark.parametrize("name", STORED)
def test_any_range_of_any_parameter_is_what_the_library_loads(name, tmp_path):
    case = CASES[name]
    model = build_model(hf_config(case.section), seed=2)
    model.save_pretrained(tmp_path)
    if STORED[name]:
        stored_otherwise(tmp_path, STORED[name])
    auto = getattr(transformers, family_of(model.config.model_type).auto_class)
    theirs = dict(auto.from_pretrained(tmp_path).named_parameters())
    section = published_weights.with_weights({"from": str(tmp_path)}, None)
    config = hf_config(section)
    weights = Weights(section, config, range(family_of(config.model_type).shape(config).num_layers))
    weights.check_ties()
    assert weights.names == theirs.keys() == dict(model.named_parameters()).keys()
    draw = torch.Generator().manual_seed(1)
    for name, expected in theirs.items():
        flat = expected.detach().flatten()
        start, stop = sorted(torch.randint(0, len(flat) + 1, (2,), generator=draw).tolist())
        for first, last in ((0, len(flat)), (start, stop + (start == stop))):
            last = min(last, len(flat))
            first = min(first, last - 1)
            assert torch.equal(weights.read(name, "weight", first, last), flat[first:last]), name


DEEP = ["model.num_hidden_layers=8", "steps=4", "checkpoint={every: 1, keep_last: 0}"]
DEEP += [
    "method={name: stacking, mode: double, phases: [{layers: 4, until: 1}, {layers: 8, until: 4}]}"
]
DEEP += ["evaluate={every: 4, sequences: 4}", "optimizer={lr: 0.01}"]


def test_what_a_shallow_checkpoint_has_goes_where_stacking_begins(published, synthetic_run):
    """Bands of layers fill from their first, so that the four layers lie in two places."""
    bands = ["method.balance_groups=2", f"model.from={published['llama']}"]
    design = make_design(load_run(synthetic_run, [*bands, *DEEP, "method.balance_groups=2"]))
    weights, held = design.weights(), design.method.layers(0)
    assert held == [0, 1, 4, 5]
    theirs = dict(auto_of(published["llama"]).named_parameters())
    for name in weights.names:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(held.index(int(parts[2])))
        expected = theirs[".".join(parts)].flatten()
        assert torch.equal(weights.read(name, "weight", 0, len(expected)), expected)
    assert len(weights.names) == len(theirs)


def auto_of(folder: Path, **more) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more)


@pytest.mark.slow
def test_stacking_begins_with_a_shallower_model_and_doubles_it(published, synthetic_run, tmp_path):
    """Losses of the first step and of the grown model's first, against the library's models of 4
    and 8 layers, which a dictionary of names copies."""
    begin = [f"model.from={published['llama']}", *DEEP]
    names = ("1 process", "data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1")
    runs = train_in(tmp_path, synthetic_run, [(name, "deep", begin) for name in names])
    small, run = auto_of(published["llama"]), prepare(load_run(runs[0]), 1)
    with Checkpoint(runs[0] / "checkpoints" / "step_00000001") as one:
        state = one.weights()
    for name in [name for name in state if name.startswith("model.layers.")]:
        _, _, layer, rest = name.split(".", 3)
        state[name] = state[f"model.layers.{int(layer) % 4}.{rest}"]
    large = transformers.AutoModelForCausalLM.from_config(run.hf_config)
    large.load_state_dict(state)
    expected = []
    for step, model in ((0, small), (1, large)):
        batches = list(run.train.micro_batches(step, Portion(0, 1, micro=2)))
        with torch.no_grad():
            expected.append(sum(loss_of(run, model, *b).item() for b in batches) / len(batches))
    for one in runs:
        assert losses(one)[:2] == pytest.approx(expected, rel=1e-6)
        assert_close(losses(one), losses(runs[0]))


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("theirs", "given", "expected"),
    [
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, ["rope_theta=5.0e+5"], LINEAR),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, ["rope_parameters.rope_theta=5.0e+5"],
         LINEAR),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
         ["rope_parameters={rope_theta: 5.0e+5}"], LINEAR),
        ({"rope_parameters": {**LINEAR, "rope_theta": 5e5}}, ["rope_scaling=null"],
         {"rope_type": "default"}),
        ({"rope_theta": 5e5}, ["rope_scaling={type: linear, factor: 2.0}"], LINEAR),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 9.0, "rope_theta": 5e5}},
         ["rope_parameters={rope_type: linear, factor: 2.0}"], LINEAR),
    ],
)  # fmt: skip
def test_fields_of_rope_stand_above_the_folders_in_older_and_newer_names(
    theirs, given, expected, published, synthetic_run, tmp_path
):
    folder = shutil.copytree(published["llama"], tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | theirs))
    begin = [f"model.from={folder}", *(f"model.{field}" for field in given)]
    rope = hf_config(load_run(synthetic_run, begin).model).rope_parameters
    assert rope == {"rope_theta": 5e5, **expected}


WRONG = {
    "hidden": (["model.hidden_size=64"], ["another shape", "model.hidden_size=64 (there: 32)"]),
    "heads": (["model.num_attention_heads=4", "model.num_key_value_heads=4"],
              ["another shape", "model.num_attention_heads=4 (there: 8)"]),
    "layers": (["model.num_hidden_layers=6"],
               ["has 4 layers, and the run begins with 6 of its 6", "method.phases[0].layers=4"]),
    "tied": (["model.tie_word_embeddings=true"],
             ["lm_head.weight and model.embed_tokens.weight are one", "there: False"]),
    "bias": (["model.attention_bias=true"], ["lack model.layers.0.self_attn.q_proj.bias"]),
    "init": (["model.init={std: 0.1}"], ["model.init cannot take effect beside model.from"]),
    "hash": ([f"model.from_sha256={'0' * 64}"], ["is not the hash of the weights"]),
    "seed": (["seeds.model=4"], ["seeds.model=4 cannot take effect with model.from"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_weights_of_another_model_are_refused(case, published, synthetic_run, capsys):
    changes, named = WRONG[case]
    begin = [f"model.from={published['llama']}", "method={name: full}"]
    error = refused(capsys, "plan", synthetic_run, *begin, *changes)
    assert all(text in error for text in named), error


def test_what_is_no_folder_of_weights_is_refused(published, synthetic_run, tmp_path, capsys):
    def error(folder) -> str:
        return refused(capsys, "plan", synthetic_run, f"model.from={folder}", "method={name: full}")

    assert "holds no config.json" in error(tmp_path)
    assert "is no folder" in error(tmp_path / "none")
    folder = shutil.copytree(published["llama"], tmp_path / "copy")
    [last] = folder.glob("*-00009-of-*.safetensors")
    last.rename(last.with_suffix(".bin"))
    assert f"{last.name}' does not exist; weights are read from safetensors alone" in error(folder)
    last.write_bytes(b"none")
    assert f"{last.name} cannot be read" in error(folder)


def test_a_begun_run_keeps_its_weights_hash(published, synthetic_run, tmp_path):
    """A folder may move, and go; other weights make another run."""
    folder = shutil.copytree(published["llama"], tmp_path / "weights")
    named = [f"run_dir={tmp_path}/run", "method={name: full}", "parallel={}"]
    config = load_run(synthetic_run, [*named, f"model.from={folder}"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("")
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    prepare(load_run(synthetic_run, [*named, f"model.from={published['llama']}"]), 1)
    with pytest.raises(UserError, match=r"another config: model.*from_sha256 is '"):
        prepare(load_run(synthetic_run, [*named, f"model.from={published['qwen3']}"]), 1)
    shutil.rmtree(folder)
    published_weights.folder_of.cache_clear()
    assert prepare(load_run(synthetic_run, [*named, f"model.from={folder}"]), 1).config == config
    assert prepare(load_run(tmp_path / "run"), 1).config == config


def test_a_name_of_the_hub_is_fetched_once_and_without_a_network_one_line_says_so(
    published, synthetic_run, tmp_path, monkeypatch, capsys
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    plan = ("plan", synthetic_run, "model.from=someone/small", "method={name: full}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    error = refused(capsys, *plan)
    assert "model.from='someone/small' is no folder here, and http://127.0.0.1:9" in error
    assert "hf download someone/small" in error
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), type("_", (Hub,), {"files": published["llama"]})
    ) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        fetched = load_run(synthetic_run, list(plan[2:])).model
        hub.shutdown()
    local = load_run(synthetic_run, [f"model.from={published['llama']}", *plan[3:]]).model
    assert fetched == {**local, "from": "someone/small"}
    published_weights.folder_of.cache_clear()
    assert load_run(synthetic_run, list(plan[2:])).model == fetched  # from the cache


def test_tokenizer_beside_the_weights_is_compared_with_the_corpus(tiny_run, tokenizer, tmp_path):
    folder = publish(tmp_path / "weights", LLAMA)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    begin = (tiny_run, f"run_dir={tmp_path}/run", f"model.from={folder}", "method={name: full}")
    config = load_run(*begin[:1], list(begin[1:]))
    prepare(config, 4)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.add_tokens(["<more>"])
    (folder / "tokenizer.model").unlink()
    loaded.save_pretrained(folder)  # another file, with one more id behind the others
    prepare(config, 4)
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="the weights are of other ids"):
        prepare(config, 4)


LARGE = {**TINY_MODEL, "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 18}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 2816}


def _memory(key: str) -> int:
    """Bytes of this process's memory, as the system counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def load_measured(run: str, overrides: list[str], folder: str) -> None:
    """Builds an engine with its weights; prints the peak of memory above that before, in bytes."""
    import deepspeed  # noqa: F401

    from est_ds.engine.build import build_engine
    from est_ds.engine.start import leave_processes, start_processes
    from est_ds.ranks.world import World

    world = World.from_environment()
    start_processes(world)
    design = make_design(load_run(run, overrides))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    load_weights(build_engine(design, world))
    print(f"peak={_memory('VmHWM') - before}")
    leave_processes()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_process_of_zero_3_holds_its_share_of_the_weights_and_no_more(
    tied, synthetic_run, tmp_path
):
    section = {**LARGE, "tie_word_embeddings": tied}
    folder = publish(tmp_path / "large", section, max_shard_size="400MB")
    parallel = "parallel={pipe: 1, zero: 3}"
    begin = [f"model.from={folder}", "method={name: full}", parallel, "precision=bf16"]
    logs = [tmp_path / f"{rank}.log" for rank in range(4)]
    given = (str(synthetic_run), begin, str(tmp_path / "events"))
    ranks = [
        fork(load_measured, given, (log, log), ROOT, environment)
        for log, environment in zip(logs, launched(4))
    ]
    assert wait(ranks, 600) == [0] * 4, logs[0].read_text()
    peaks = [int(log.read_text().rpartition("peak=")[2]) for log in logs]
    layer = 4 * (4 * 1024**2 + 3 * 1024 * 2816)
    parameters = 296_784_896 - tied * 32000 * 1024
    config = load_run(synthetic_run, begin)
    states = held(
        Process(config, parameters, (parameters,), 4, parameters, parameters, on_gpu=False)
    )
    share = states.weights + states.gradients + states.optimizer
    print(f"peaks {peaks}, share {share:.0f}, layer {layer}")
    assert max(peaks) < 1.3 * share + layer, (peaks, share)
