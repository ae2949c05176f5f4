"""Names and layouts of state dicts: those of the networks in PyTorch, and lossless round trips."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import defaults
from dssn_jax.weights import names, pretrained


def abstract_variables(encoder, classes=21, **options):
    model = defaults.get_config().model
    model.update({"encoder": encoder, **options})
    return pretrained.abstract_variables(model, classes)


def meta_twin(*arguments):
    """Returns the network in PyTorch, without memory for its tensors."""
    torch = pytest.importorskip("torch")
    from tests.reference import torch_twin

    with torch.device("meta"):
        return torch_twin.DeepLabV3Plus(*arguments)


@pytest.mark.parametrize(("encoder", "classes"), [("resnet50", 19), ("resnet101", 21), ("xception", 81)])
def test_round_trips_are_exact(encoder, classes):
    """PyTorch -> here -> PyTorch, tensor by tensor; the twin in PyTorch loads the result with strict=True."""
    torch = pytest.importorskip("torch")
    twin, rng = meta_twin(encoder, classes), np.random.default_rng(0)
    theirs = {
        name: rng.random(value.shape, np.float32)
        for name, value in twin.state_dict().items()
        if value.dtype.is_floating_point
    }
    ours = names.from_state_dict(theirs, abstract_variables(encoder, classes))
    back = names.with_counters(names.to_state_dict(ours))
    twin.load_state_dict(
        {name: torch.from_numpy(value.copy()) for name, value in back.items()}, strict=True, assign=True
    )
    loaded = twin.state_dict()
    for name, value in theirs.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value, err_msg=name)
    assert {name for name in loaded if name not in theirs} == {n for n in loaded if n.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("stem", "shortcut"), [("7x7", "strided"), ("deep_narrow", "strided"), ("deep_narrow", "average")]
)
def test_names_of_other_stems(stem, shortcut):
    twin = meta_twin("resnet50", 21, stem, shortcut)
    theirs = {name: tuple(value.shape) for name, value in twin.state_dict().items() if "num_batches" not in name}
    assert names.shapes(abstract_variables("resnet50", stem=stem, shortcut=shortcut)) == theirs


class Transformer(nn.Module):
    """Layers of a network without batch norm: [B, H, W, 3] -> [B, 2 H, 2 W, 5]."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), padding="VALID", name="proj")(x)
        shape, tokens = x.shape, x.reshape(len(x), -1, 4)
        tokens += self.param("pos_embed", nn.initializers.normal(), (1, tokens.shape[1], 4))
        tokens += nn.Embed(6, 4, name="classes")(jnp.arange(tokens.shape[1]) % 6)
        tokens = nn.Dense(4, name="blocks_0")(nn.LayerNorm(epsilon=1e-5, name="norm")(tokens))
        tokens *= self.param("gamma", nn.initializers.normal(), (4,))
        upsample = nn.ConvTranspose(5, (2, 2), (2, 2), padding="VALID", transpose_kernel=True, name="up")
        return upsample(tokens.reshape(shape))


def torch_transformer(x):
    """The same in PyTorch, for images of 5 x 6 pixels; returns its module, with random tensors, and its result."""
    torch = pytest.importorskip("torch")

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Conv2d(3, 4, (3, 2))
            self.pos_embed = torch.nn.Parameter(torch.zeros(1, 15, 4))
            self.classes = torch.nn.Embedding(6, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
            self.gamma = torch.nn.Parameter(torch.zeros(4))
            self.up = torch.nn.ConvTranspose2d(4, 5, 2, 2)

        def forward(self, x):
            x = self.proj(x)
            tokens = x.flatten(2).mT + self.pos_embed + self.classes(torch.arange(15) % 6)
            return self.up((self.blocks[0](self.norm(tokens)) * self.gamma).mT.reshape(x.shape))

    twin = Twin()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.from_numpy(np.random.default_rng(parameter.numel()).normal(size=parameter.shape)))
        return twin, twin(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def test_a_network_without_batch_norm_has_pytorchs_numbers():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    twin, expected = torch_transformer(x)
    theirs = {name: value.numpy() for name, value in twin.state_dict().items()}
    like = jax.eval_shape(Transformer().init, jax.random.PRNGKey(0), x)
    assert like.keys() == {"params"} and names.compare(theirs, names.shapes(like)).fits
    variables = names.from_state_dict(theirs, like)
    np.testing.assert_allclose(Transformer().apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, names.to_state_dict(variables), theirs)


def test_a_rule_of_its_own_comes_before_the_others(monkeypatch):
    rule = names.Rule(r"attn_(\d+)/(query|key)/kernel", r"attention.\1.\2_proj.weight", {3: (1, 2, 0)})
    monkeypatch.setattr(names, "RULES", [rule, *names.RULES])
    attention = {"query": {"kernel": np.zeros((2, 3, 4)), "bias": np.zeros(3)}, "kernel": np.zeros((5, 6))}
    variables = {"params": {"encoder": {"blocks_0": {"attn_1": attention, "my_attn_1": attention}}}}
    shapes = {
        "backbone.blocks.0.attention.1.query_proj.weight": (3, 4, 2),
        "backbone.blocks.0.attn.1.query.bias": (3,),
        "backbone.blocks.0.attn.1.weight": (6, 5),
        "backbone.blocks.0.my_attn.1.query.weight": (2, 3, 4),
        "backbone.blocks.0.my_attn.1.query.bias": (3,),
        "backbone.blocks.0.my_attn.1.weight": (6, 5),
    }
    assert names.shapes(variables) == shapes
    state_dict = {name: np.random.default_rng(0).random(shape) for name, shape in shapes.items()}
    with jax.enable_x64(True):
        back = names.to_state_dict(names.from_state_dict(state_dict, variables))
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)


def test_standard_names():
    encoder = {"conv1.weight": 0, "bn1.num_batches_tracked": 1, "fc.bias": 2}
    assert names.standardize(encoder) == {"backbone.conv1.weight": 0, "backbone.fc.bias": 2}
    network = {"module.backbone.conv1.weight": 0, "module.classifier.bias": 1}
    assert names.standardize(network) == {"backbone.conv1.weight": 0, "classifier.bias": 1}


def test_comparison():
    expected = {"backbone.conv1.weight": (2, 3, 7, 7), "backbone.layer1.0.weight": (2,), "classifier.bias": (3,)}
    tensors = {name: np.zeros(shape) for name, shape in expected.items()}
    fitting = names.compare({**tensors, "backbone.fc.bias": np.zeros(1000)}, expected)
    assert fitting.fits and fitting.matched == list(expected) and fitting.unused == ["backbone.fc.bias"]
    del tensors["classifier.bias"]
    tensors["backbone.conv1.weight"] = np.zeros((2, 3, 3, 3))
    tensors["backbone.layer1.1.weight"] = np.zeros(2)
    comparison = names.compare(tensors, expected)
    assert not comparison.fits
    assert comparison == names.Comparison(
        matched=["backbone.layer1.0.weight"], missing=["classifier.bias"], wrong_shape=["backbone.conv1.weight"],
        unexpected=["backbone.layer1.1.weight"], unused=[],
    )  # fmt: skip


def test_filling_names_what_does_not_fit():
    like = {"params": {"classifier": {"kernel": jax.ShapeDtypeStruct((1, 1, 4, 3), np.float32)}}, "batch_stats": {}}
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 4, 1, 1\), the model needs \(3, 4, 1, 1\)"):
        names.from_state_dict({"classifier.weight": np.zeros((2, 4, 1, 1))}, like)
    with pytest.raises(KeyError, match="classifier.weight"):
        names.from_state_dict({}, like)
