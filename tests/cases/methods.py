"""Tables that every test over methods, or over presets, goes through."""

from __future__ import annotations

from cases.plans import BERT, GPT2, TINYLLAMA, UL2

HALF = dict(layers=0.5, heads=0.5, columns=0.5)
TWO = [dict(until=0.5, **HALF), dict(until=1.0)]

# Every setting of every method at least once; eight layers and a hundred steps fit them all.
SECTIONS = {
    "full": dict(name="full"),
    "est": dict(name="est", phases=TWO),
    "est_layers": dict(name="est", phases=[dict(until=1.0, layers=0.5)]),
    "est_heads": dict(name="est", phases=[dict(until=1.0, heads=0.5)], head_rule="groups"),
    "est_columns": dict(name="est", phases=[dict(until=1.0, columns=0.3)]),
    "est_heads_columns": dict(name="est", phases=[dict(until=1.0, heads=0.5, columns=0.7)]),
    "est_five_phases": dict(
        name="est",
        phases=[dict(until=u, layers=u, name=f"p{u}") for u in (0.2, 0.4, 0.6, 0.8)]
        + [dict(until=1.0)],
    ),
    "est_bernoulli": dict(name="est", phases=TWO, counts="bernoulli", scale=dict(layers="sqrt")),
    "est_bernoulli_balanced": dict(
        name="est", phases=TWO, counts="bernoulli", balance_groups=3, head_rule="groups",
        scale=dict(layers="inverse"),
    ),
    "est_sublayer": dict(name="est", phases=TWO, skip="sublayer", always_keep=[2]),
    "est_sublayer_balanced": dict(name="est", phases=TWO, skip="sublayer", balance_groups=[3, 5]),
    "raptr": dict(name="raptr", phases=[dict(until=0.5, layers=4), dict(until=1.0)]),
    "raptr_width": dict(
        name="raptr", phases=[dict(until=0.5, heads=0.5, columns=0.5), dict(until=1.0)]
    ),
    "layer_drop": dict(name="layer_drop", drop=0.3),
    "layer_drop_balanced": dict(
        name="layer_drop", drop=0.6, balance_groups=4, scale=dict(layers="inverse")
    ),
    "layer_drop_sublayer": dict(name="layer_drop", skip="sublayer", always_keep=[0, -1]),
    "pld": dict(name="pld", gamma=0.05),
    "pld_by_length": dict(name="pld"),
    "pld_sublayer": dict(name="pld", gamma=0.05, skip="sublayer", count_from=0),
    "decay_drop": dict(name="decay_drop", p_max=0.9),
    "static": dict(name="static", until=0.5, **HALF),
    "static_sublayer": dict(name="static", until=40, layers=3, skip="sublayer"),
    "stacking": dict(
        name="stacking", phases=[dict(until=0.5, layers=4), dict(until=1.0, layers=8)]
    ),
    "stacking_random_balanced": dict(
        name="stacking", mode="random", balance_groups=2,
        phases=[dict(until=0.2, layers=0), dict(until=0.5, layers=3), dict(until=1.0, layers=8)],
    ),
    "stacking_midas": dict(
        name="stacking", mode="midas", alpha=1.0,
        phases=[dict(layers=0.25), dict(layers=0.5), dict(layers=1.0)],
    ),
    "token_drop": dict(name="token_drop", start=0.25, until=0.7),
    "token_drop_layers": dict(name="token_drop", start=0.5, until=1.0, layers=[0, 2]),
}

# Of every preset, by the name of its file: shape, steps, fraction of block FLOPs saved.
SAVED_BY_PRESET = {
    "full": (GPT2, 1000, 0.0),
    "est_gpt2": (GPT2, 150_000, 0.2667),
    "est_tinyllama": (TINYLLAMA, 24_000, 0.2500),
    "raptr_bert": (BERT, 100_000, 1 - 1 / 1.3333),
    "raptr_ul2": (UL2, 400_000, 1 - 1 / 1.2),
    "layer_drop": (GPT2, 100_000, 0.2),
    # The mean of exp(-100 t / T) over the run is 1/100 and half a step; of i / L over layers 13/24.
    "pld": (BERT, 200_000, 13 / 24 * (1 - 0.5 - 0.5 * 0.01)),
    "decay_drop_0b9": (GPT2, 100_000, 0.05),
    "decay_drop_1b8": (UL2, 100_000, 0.15),
    "decay_drop_3b9": (UL2, 100_000, 0.2),
    # Half is left out up to step 70k: of the layers; of attention, a third of them; of the MLP.
    "est_layers": (GPT2, 150_000, 7 / 15 / 2),
    "est_heads": (GPT2, 150_000, 7 / 15 / 2 / 3),
    "est_columns": (GPT2, 150_000, 7 / 15 / 2 * 2 / 3),
    "raptr_ul2_warm": (UL2, 400_000, 0.925 / 6),
    "constant_est_gpt2": (GPT2, 150_000, 0.2667),
    "constant_est_tinyllama": (TINYLLAMA, 24_000, 0.2507),
    "constant_raptr_bert": (BERT, 100_000, 0.25),
    "constant_raptr_ul2": (UL2, 400_000, 1 / 6),
    "static": (GPT2, 150_000, 0.2667),
    "stacking": (GPT2, 100_000, 0.375),
    "stacking_raptr": (BERT, 90_000, 0.25),
    "midas": (UL2, 400_000, (1 * 3 + 2 * 2 + 3 * 1) / 40),
    "g_stack": (UL2, 100_000, 0.1 * 3 / 4),
    "zero_one": (GPT2, 100_000, 0.8 * 11 / 12),
    # 64 of 1,024 positions at first, and then 64 + (0, 1, .. 959), each equally long.
    "token_drop": (GPT2, 100_000, 0.775 * (1 - (64 + 959 / 2) / 1024) * 10 / 12),
}


def refusal(section: dict, family: str) -> str | None:
    """What the error says where a family refuses a section of the table; None: it takes it."""
    name, sizes = section["name"], [section, *section.get("phases", [])]
    if family == "t5":
        refused = {
            "stacking": "not all of one shape",
            "token_drop": "share a bias between all positions",
        }
        return refused.get(name)
    if not family.startswith("mamba"):
        return None
    if name == "token_drop":
        return "carry a state from one position to the next"
    if section.get("skip") == "sublayer":
        return "method.skip=sublayer cannot take effect"
    heads = any("heads" in size for size in sizes)
    return "heads=0.5 cannot take effect" if heads else None


def without_heads(section: dict) -> dict:
    """A section of the table that drops no heads."""
    section = {k: v for k, v in section.items() if k not in ("heads", "head_rule")}
    if "phases" in section:
        section["phases"] = [
            {k: v for k, v in phase.items() if k != "heads"} for phase in section["phases"]
        ]
    return section


def taken(section: dict, family: str) -> dict | None:
    """A section of the table as a family takes it; None: it refuses it, or drops nothing then."""
    if family.startswith("mamba") and section != SECTIONS["est_heads"]:
        section = without_heads(section)
    return section if refusal(section, family) is None else None


def fitting(section: dict, num_layers: int) -> dict:
    """A section of the table of eight layers for a model of fewer."""
    section = dict(section)
    if isinstance(groups := section.get("balance_groups"), list):
        section["balance_groups"] = [num_layers - 1, 1]
    elif groups:
        section["balance_groups"] = min(groups, 2)
    if section["name"] == "stacking":
        depths = [min(p["layers"], num_layers - n) for n, p in enumerate(section["phases"][::-1])]
        depths[0] = num_layers
        section["phases"] = [
            {**p, "layers": d} for p, d in zip(section["phases"], depths[::-1], strict=True)
        ]
    if isinstance(section.get("always_keep"), list):
        section["always_keep"] = [i for i in section["always_keep"] if i < num_layers]
    if section["name"] == "raptr" and "layers" in section["phases"][0]:
        section["phases"] = [{"until": 0.5, "layers": num_layers - 1}, {"until": 1.0}]
    return section
