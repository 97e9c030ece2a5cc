"""`est-ds plan`: the JSON contract, and models of any size."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from cases.families import CASES
from cases.tiny import make_config
from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.plans.methods.stacking import g_stack_tokens
from est_ds.report.estimate import make_estimate
from est_ds.report.plan_figure import plan_figure
from est_ds.report.plan_text import layouts, plan_report

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}


def test_json_is_the_contract():
    plan = json.loads(plan_report(make_config(), as_json=True))
    assert set(plan) == {"phases", "saved", "total_steps", "parameters"}
    small, full = plan["phases"]
    assert {k: small[k] for k in ("name", "from_step", "until_step")} == {
        "name": "small",
        "from_step": 0,
        "until_step": 5,
    }
    assert [small[f"kept_{k}"] for k in ("layers", "heads", "columns")] == [2, 4, 48]
    assert [full[f"kept_{k}"] for k in ("layers", "heads", "columns")] == [4, 8, 96]
    assert (full["blocks_ratio"], full["model_ratio"]) == (1.0, 1.0)
    # Of a layer's weights 64 x 64 x 2 (q, o) + 64 x 32 x 2 (k, v) + 64 x 96 x 3, half of q, o
    # and of the MLP is kept, k and v whole, in half of the layers.
    attention, groups, mlp = 64 * 64 * 2, 64 * 32 * 2, 64 * 96 * 3
    ratio = (attention / 2 + groups + mlp / 2) / (attention + groups + mlp) / 2
    assert small["blocks_ratio"] == pytest.approx(ratio)
    assert plan["saved"]["blocks"] == pytest.approx((1 - ratio) * 5 / 20)
    assert 0 < plan["saved"]["model"] < plan["saved"]["blocks"]
    assert plan["total_steps"] == 20
    norms = 4 * 2 * 64 + 64
    assert plan["parameters"] == 4 * (attention + groups + mlp) + 2 * 512 * 64 + norms


def test_table_shows_phases_batch_and_memory_in_80_columns():
    config = make_config(parallel={"pipe": 2, "zero": 1, "processes": 4})
    text = plan_report(config, as_json=False)
    assert max(map(len, text.splitlines())) <= 80 and text.isascii()
    assert "\x1b" not in text
    assert "global_batch 8 = micro_batch 2 x accumulation 2 x data_parallel 2" in text
    assert "4 = 2 pipe stages x 2 replicas, ZeRO 1, fp32" in text
    assert "small" in text and "full" in text and "weights" in text
    assert "assumed" not in text
    assert re.search(r"^memory +\d\S* MiB of tensors at most \(pipe stage", text, re.MULTILINE)
    text = plan_report(make_config(), as_json=False)
    assert "one replica is assumed" in text and "not checked  not here: absent" in text


def test_layouts_show_only_replicas_by_which_the_batch_divides():
    assert layouts(make_config()) == [(1, 4), (2, 2), (4, 1)]
    with pytest.raises(UserError, match="batch.global"):
        plan_report(make_config(batch={"global": 7, "micro": 2}), as_json=False)


@pytest.mark.parametrize(("whole", "micro", "replicas"), [(1024, 8, 256), (12, 5, 4), (10, 4, 3)])
def test_what_is_advised_for_a_batch_that_does_not_divide_divides(whole, micro, replicas):
    batch = make_config(batch={"global": whole, "micro": micro}).batch
    with pytest.raises(UserError, match="is not a multiple of batch.micro") as refused:
        batch.accumulation(replicas)
    advised = re.findall(r"(?:use|or) batch\.(global|micro)=(\d+)", str(refused.value))
    assert len(advised) == (2 if whole % replicas == 0 else 1)
    for field, value in advised:
        changed = {"global": whole, "micro": micro} | {field: int(value)}
        assert make_config(batch=changed).batch.accumulation(replicas) > 0


def test_a_plan_says_when_g_stack_would_stack():
    # log10 d = .88 x 9.8451 + 163.27 / 22.1004 - 5.74 = 10.3113 of 7 B parameters, 300 G tokens.
    assert g_stack_tokens(7e9, 6 * 7e9 * 300e9) == pytest.approx(2.048e10, rel=1e-3)
    phases = [{"until": 4, "layers": 1}, {"until": 20, "layers": 4}]
    method = {"name": "stacking", "mode": "double", "phases": phases}
    estimate = make_estimate(make_config(method=method))
    dense = 20 * estimate.dense_step_flops
    assert g_stack_tokens(estimate.json["parameters"], dense) > 20 * 8 * 64
    said = " ".join(plan_report(make_config(method=method), as_json=False).split())
    assert "after 2.05 k tokens (step 4, 0.200 of the run); by G_stack's rule after" in said
    assert "T tokens (never in this run:" in said
    large = load_run(
        ROOT / "configs/run/raptr_ul2.yaml", [f"method={ROOT}/configs/method/g_stack.yaml"]
    )
    said = " ".join(plan_report(large, as_json=False).split())
    dense = large.steps * make_estimate(large).dense_step_flops
    tokens = g_stack_tokens(make_estimate(large).json["parameters"], dense)
    step = tokens / large.tokens_per_step
    assert f"(step {step:,.0f}, {step / large.steps:.3f} of the run)" in said
    gradual = {**method, "mode": "gradual", "phases": [{"until": 4, "layers": 2}, phases[1]]}
    assert "G_stack" not in plan_report(make_config(method=gradual), as_json=False)


def test_stages_hold_all_parameters_together():
    whole = make_estimate(make_config())
    cut = make_estimate(make_config(parallel={"pipe": 2, "zero": 1}))
    assert whole.design.pipe_stage_parameters == (whole.json["parameters"],)
    assert len(cut.design.pipe_stage_parameters) == 2
    assert sum(cut.design.pipe_stage_parameters) == cut.json["parameters"]
    # The last stage has the final norm beside what both ends have alike.
    assert cut.design.pipe_stage_parameters[1] - cut.design.pipe_stage_parameters[0] == 64


def test_plan_of_7b_parameters_takes_seconds_and_no_memory():
    config = make_config(model=LLAMA_7B, precision="bf16")
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from est_ds.config.run_config import RunConfig\n"
        "from est_ds.report.plan_text import plan_report\n"
        "config = RunConfig.model_validate_json(sys.argv[1])\n"
        "start = time.process_time()\n"
        "print(plan_report(config, as_json=True))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "peak = status.partition('VmHWM:')[2].split()[0]\n"
        "print(time.process_time() - start, peak, 'deepspeed' in sys.modules, file=sys.stderr)\n"
    )
    arguments = [sys.executable, "-c", script, config.model_dump_json(by_alias=True)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 6_738_415_616
    spent_s, peak_kib, imported = done.stderr.split()[-3:]
    assert float(spent_s) < 30
    # Not of getrusage: it counts what the parent held until exec, and a process of pytest is large.
    assert int(peak_kib) < 1024**2, "the weights alone are 13 GiB"
    assert imported == "False", "planning needs no DeepSpeed"


def test_a_plan_of_mamba_has_inner_channels_as_columns_and_no_heads():
    """Half of the layers, with half of the channels, for half of the steps: every projection of
    Mamba has the channels on one side. The parameters are those that its authors say."""
    section = yaml.safe_load((ROOT / "configs" / "model" / "mamba_130m.yaml").read_text())
    phases = [{"until": 0.5, "layers": 0.5, "columns": 0.5}, {"until": 1.0}]
    config = make_config(model=section, method={"name": "est", "phases": phases})
    plan = make_estimate(config).json
    kept = {key: plan["phases"][0][f"kept_{key}"] for key in ("layers", "heads", "columns")}
    assert kept == {"layers": 12, "heads": 0, "columns": 768}
    assert plan["saved"]["blocks"] == pytest.approx(0.75 / 2)
    assert plan["parameters"] == 129_135_360
    assert "heads of" not in " ".join(plan_report(config, as_json=False).split())


def test_mamba_cannot_keep_documents_apart():
    config = make_config(model=CASES["mamba"].section, method={"name": "full"})
    data = config.data.model_copy(update={"documents": "separate"})
    with pytest.raises(UserError, match="data.documents='separate' does not work with.*'mamba'"):
        make_design(config.model_copy(update={"data": data}))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_is_drawn_without_a_display(tmp_path, ending):
    file = tmp_path / "new" / f"plan.{ending}"
    plan_report(make_config(), as_json=False, plot=str(file))
    assert file.stat().st_size > 5_000


def test_the_plot_of_an_encoder_decoder_saves_what_the_plan_says():
    t5 = {
        "model_type": "t5",
        "vocab_size": 640,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    plan = make_estimate(make_config(model=t5, objective={"name": "ul2"}))
    axes = plan_figure(plan).axes[1]
    end = {line.get_label(): line.get_ydata()[-1] for line in axes.get_lines()}
    saved = plan.json["saved"]["model"]
    assert 1 - end["est"] / end["dense"] == pytest.approx(saved)
    assert axes.get_legend().get_title().get_text() == f"{saved:.1%} saved"


def test_plot_into_no_picture_or_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'.docx' is no picture format; use one of .*\.png"):
        plan_report(make_config(), as_json=True, plot=f"{tmp_path}/plan.docx")
    with pytest.raises(UserError, match="the ending '' is no picture format"):
        plan_report(make_config(), as_json=True, plot="")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plan_report(make_config(), as_json=True, plot=f"{tmp_path}/file/plan.png")
