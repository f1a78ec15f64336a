"""Hooks on the library's own model: off they change nothing, on they do what the equations say, and no later token reaches back."""

import math
import warnings

import pytest
import torch
import transformers

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.models import hooks
from tests import tiny

NAMES = tiny.WITH_HEADS
IDS = torch.tensor([[3, 9, 4, 17, 30, 8, 21, 40]])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return tiny.heads(request.param)


def kv_heads(model):
    return hooks.anatomy(model).kv_heads


def values_of(model, layer):
    """Each query head's values, (tokens, heads, size), by the projection alone."""
    found = hooks.anatomy(model)
    with torch.no_grad(), hooks.capture(model, "values", layers=[layer]) as seen:
        model(input_ids=IDS, use_cache=False)
    return seen["values", layer][0].repeat_interleave(found.heads // found.kv_heads, dim=1)


def test_hooks_off_is_bit_equal_and_leaves_no_trace(model):
    before, weights = logits(model), [p.clone() for p in model.parameters()]
    with hooks.ablate_heads(model, [(1, 2)]), hooks.scale(model, "attention", 0, 0.5):
        assert not torch.equal(logits(model), before) and hook_count(model) == 2
    with pytest.raises(ZeroDivisionError), hooks.ablate_heads(model, [(0, 0), (1, 2)], component="v"):
        1 / 0  # noqa: B018
    assert hook_count(model) == 0 and torch.equal(logits(model), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_watching_changes_nothing(model):
    before = logits(model)
    sites = [site for site in hooks.SITES if site != "neurons"]
    with hooks.capture(model, *sites) as seen:
        assert torch.equal(logits(model), before)
    found = hooks.anatomy(model)
    size = (1, IDS.shape[1])
    assert seen["queries", 1].shape == seen["heads", 1].shape == (*size, found.heads, found.head_dim)
    assert seen["keys", 1].shape == seen["values", 1].shape == (*size, found.kv_heads, found.head_dim)
    for site in ("layer_input", "attention", "mlp", "layer"):
        assert seen[site, 1].shape == (*size, found.width)
    assert torch.equal(seen["layer", 0], seen["layer_input", 1])


@pytest.mark.parametrize("component", ["q", "k"])
def test_undifferentiated_attention_is_the_running_mean_of_the_values(model, component):
    """The closed form: with epsilon 0 position t sees every visible position alike, so that the head gives the mean of their values."""
    found, layer = hooks.anatomy(model), 1
    head = 1 if component == "k" else 2
    with (
        torch.no_grad(),
        hooks.ablate_heads(model, [(layer, head)], component=component, epsilon=0.0),
        hooks.capture(model, "heads") as seen,
    ):
        model(input_ids=IDS, use_cache=False)
    group = found.heads // found.kv_heads
    touched = range(head * group, head * group + group) if component == "k" else [head]
    values = values_of(model, layer)
    config = model.config.get_text_config()
    window = config.sliding_window if "sliding_attention" in str(getattr(config, "layer_types", "")) else None
    if type(model).__name__ == "MistralForCausalLM":
        window = config.sliding_window
    elif window and config.layer_types[layer] != "sliding_attention":
        window = None
    for t in range(IDS.shape[1]):
        first = max(0, t + 1 - window) if window else 0
        for h in touched:
            assert torch.allclose(seen["heads", layer][0, t, h], values[first : t + 1, h].mean(0), atol=1e-4, rtol=1e-4)


def test_a_small_epsilon_is_close_to_zero(model):
    with hooks.ablate_heads(model, [(1, 2)], epsilon=0.0):
        exact = logits(model)
    with hooks.ablate_heads(model, [(1, 2)], epsilon=1e-5):
        assert torch.allclose(logits(model), exact, atol=2e-2)


def test_scaling_contribution_shrinks_one_head_alone(model):
    with torch.no_grad(), hooks.capture(model, "heads") as plain:
        model(input_ids=IDS, use_cache=False)
    with (
        torch.no_grad(),
        hooks.ablate_heads(model, [(0, 3)], component="v", epsilon=0.25),
        hooks.capture(model, "heads") as seen,
    ):
        model(input_ids=IDS, use_cache=False)
    wanted = plain["heads", 0].clone()
    wanted[:, :, 3] *= 0.25
    assert torch.equal(seen["heads", 0], wanted)


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("kind", ["scale", "mean"])
def test_no_later_token_reaches_back(model, component, kind):
    """Causality, ablated: another last token leaves every earlier position as it was."""
    other = IDS.clone()
    other[0, -1] = 45
    heads = [(0, 1), (1, 0), (2, 1)]
    with hooks.ablate_heads(model, heads, component=component, kind=kind, epsilon=1e-5):
        here, there = logits(model), logits(model, other)
    assert torch.allclose(here[:, :-1], there[:, :-1], atol=1e-4) and not torch.allclose(
        here[:, -1], there[:, -1], atol=1e-2
    )


def test_mean_replacements_follow_each_other(model):
    with torch.no_grad(), hooks.capture(model, "queries") as plain:
        model(input_ids=IDS, use_cache=False)
    with (
        torch.no_grad(),
        hooks.ablate_heads(model, [(0, 2), (0, 1)], kind="mean"),
        hooks.capture(model, "queries") as seen,
    ):
        model(input_ids=IDS, use_cache=False)
    queries = plain["queries", 0].clone()
    for head in (2, 1):
        queries[:, :, head] = queries.mean(2)
    assert torch.allclose(seen["queries", 0], queries, atol=1e-5)


def test_each_is_every_head_as_if_alone(model):
    for component, kind in (("q", "scale"), ("k", "mean"), ("v", "mean")):
        many = hooks.anatomy(model).count(component)
        with (
            torch.no_grad(),
            hooks.ablate_heads(model, "each", component=component, kind=kind, layers=[1]),
            hooks.capture(model, "heads") as all_of_them,
        ):
            model(input_ids=IDS, use_cache=False)
        group = hooks.anatomy(model).heads // many
        for head in range(many):
            with (
                torch.no_grad(),
                hooks.ablate_heads(model, [(1, head)], component=component, kind=kind),
                hooks.capture(model, "heads") as one,
            ):
                model(input_ids=IDS, use_cache=False)
            own = slice(head * group, head * group + group)
            assert torch.allclose(all_of_them["heads", 1][:, :, own], one["heads", 1][:, :, own], atol=1e-5)


def test_patching_from_another_run_carries_it_over(model):
    """All heads and the MLP of all layers taken from another run of equal first token make this run's attention and MLP that run's."""
    other = IDS.flip(1)
    with torch.no_grad(), hooks.capture(model, "layer") as seen:
        wanted = model(input_ids=other, use_cache=False).logits
    last = len(hooks.anatomy(model).layers) - 1
    with hooks.patch(model, "layer", last, seen["layer", last]):
        assert torch.equal(logits(model), wanted)
    with hooks.patch(model, "layer", last, seen["layer", last][:, 2:4], positions=slice(2, 4)):
        mixed = logits(model)
    assert torch.allclose(mixed[:, 2:4], wanted[:, 2:4], atol=1e-4) and torch.allclose(
        mixed[:, 4:], logits(model)[:, 4:], atol=1e-4
    )


def test_skipped_layers_pass_their_input_on(model):
    with torch.no_grad(), hooks.skip_layers(model, [1]), hooks.capture(model, "layer_input") as seen:
        model(input_ids=IDS, use_cache=False)
    assert torch.equal(seen["layer_input", 1], seen["layer_input", 2])


def test_mean_ablation_takes_the_mean_of_the_unpadded(model):
    rows = [{"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}]
    with torch.no_grad(), hooks.capture(model, "heads", layers=[1]) as seen:
        model(**rows[0])
        mean = seen["heads", 1][rows[0]["attention_mask"].bool()].mean(0)
    with (
        hooks.mean_ablate(model, "heads", 1, rows, index=[2]),
        torch.no_grad(),
        hooks.capture(model, "heads", layers=[1]) as after,
    ):
        model(input_ids=IDS, use_cache=False)
    assert torch.allclose(after["heads", 1][0, :, 2], mean[2].expand(IDS.shape[1], -1), atol=1e-5)
    assert not torch.allclose(after["heads", 1][0, :, 1], mean[1].expand(IDS.shape[1], -1), atol=1e-3)


def test_neurons_are_what_the_last_projection_reads(model):
    found = hooks.anatomy(model)
    if type(model).__name__ == "MixtralForCausalLM":
        with pytest.raises(InputError, match="mixture of experts"):
            found.tap("neurons", 0)
        return
    with torch.no_grad(), hooks.capture(model, "neurons", "mlp") as seen:
        model(input_ids=IDS, use_cache=False)
        given = found.tap("neurons", 0).module(seen["neurons", 0])
    assert torch.allclose(given, seen["mlp", 0], atol=1e-5)
    with hooks.scale(model, "neurons", 0, 0.0), torch.no_grad(), hooks.capture(model, "neurons") as off:
        model(input_ids=IDS, use_cache=False)
    assert not off["neurons", 0].any() and off["neurons", 1].any()


@pytest.mark.parametrize("site", ["queries", "keys", "values"])
def test_weights_come_in_the_shape_of_their_site(model, site):
    """Scaling a head's rows scales what the projection gives for that head, and nothing else."""
    found = hooks.anatomy(model)
    tap = found.projection(site, 1)
    x = torch.randn(1, 4, found.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tap.view(tap.module(x))
        weights = tap.weights()
        kept = {name: value.clone() for name, value in weights.items()}
        for value in weights.values():
            value[..., 1, :] *= 0.5
        after = tap.view(tap.module(x))
        for name, value in weights.items():
            value.copy_(kept[name])
    wanted = before.clone()
    wanted[..., 1, :] *= 0.5
    assert torch.allclose(after, wanted, atol=1e-6)


def test_output_weights_by_head(model):
    found = hooks.anatomy(model)
    tap = found.tap("heads", 0)
    heads = torch.randn(1, 3, found.heads, found.head_dim, generator=torch.Generator().manual_seed(0))
    bias = getattr(tap.module, "bias", None)
    with torch.no_grad():
        wanted = tap.module(heads.flatten(2)) - (0 if bias is None else bias)
        assert torch.allclose(torch.einsum("bthe,dhe->btd", heads, tap.weights()["weight"]), wanted, atol=1e-5)


# --- bad input ----------------------------------------------------------------------------------------------------------------------------
def test_heads_that_are_not_there():
    model = tiny.heads("llama")
    with (
        pytest.raises(InputError, match=r"layer 3 head 9 \(model has 3 layers, 4 heads\)"),
        hooks.ablate_heads(model, [(3, 9)]),
    ):
        pass
    with pytest.raises(InputError, match="2 KV heads"), hooks.ablate_heads(model, [(0, 2)], component="k"):
        pass
    with pytest.raises(InputError, match="layer 7"):
        hooks.anatomy(model).tap("heads", 7)
    with pytest.raises(UnknownNameError, match="'queries'"):
        hooks.anatomy(model).tap("querys", 0)
    with pytest.raises(InputError, match="outside"), hooks.scale(model, "heads", 0, 0.0, index=[4]):
        logits(model)
    assert hook_count(model) == 0


@pytest.mark.parametrize("epsilon", [-1e-9, math.nan, math.inf])
def test_epsilon_must_be_a_small_number(epsilon):
    with (
        pytest.raises(InputError, match="epsilon"),
        hooks.ablate_heads(tiny.heads("llama_mha"), [(0, 0)], epsilon=epsilon),
    ):
        pass


def test_unknown_components_kinds_and_names():
    model = tiny.heads("llama_mha")
    for options in ({"component": "o"}, {"kind": "zero"}):
        with pytest.raises(UnknownNameError), hooks.ablate_heads(model, [(0, 0)], **options):
            pass
    for wrong in ("2", "2.x", "a.b", "-1.0", "1.2.3"):
        with pytest.raises(InputError, match="LAYER"):
            hooks.parse_heads([wrong])
    with pytest.raises(InputError, match="twice"):
        hooks.parse_heads(["1.2", "1.2"])
    with pytest.raises(InputError, match="finite"):
        hooks.scale(model, "heads", 0, math.nan)
    with pytest.raises(InputError, match="one token"):
        hooks.mean_ablate(model, "heads", 0, [])


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2),
        transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        ),
        transformers.FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_standard_decoder_attention_are_named(config):
    kind = transformers.AutoModelForMaskedLM if config.model_type == "bert" else transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_config(config)
    with pytest.raises(InputError, match=rf"{type(model).__name__} has no standard decoder attention. Sought: layers"):
        hooks.anatomy(model)


def test_queries_and_keys_of_one_head_are_allowed_with_a_warning():
    model = tiny.heads("llama")
    with hooks.ablate_heads(model, [(0, 3)]):
        with pytest.warns(UserWarning, match="layer 0 head 3"), hooks.ablate_heads(model, [(0, 1)], component="k"):
            logits(model)
        with warnings.catch_warnings(), hooks.ablate_heads(model, [(0, 0), (1, 1)], component="k"):
            warnings.simplefilter("error")
            logits(model)
