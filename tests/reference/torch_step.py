"""The training step of DSSN in PyTorch, written from docs/method.md: `benchmarks.step` compares ours with it.

The work is that of our step except for the colors of the strong views, which its batch has ready-made, as from the
original's loaders: the teacher labels both weak views in one forward pass; the student predicts labeled and weak images
with two perturbed copies of the features, then both strong views; all loss terms; SGD with two learning rates; EMA of
the teacher.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F

from tests.reference import torch_twin

IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Form:
    """Precision and layout in which the step runs."""

    tf32: bool = False
    bfloat16: bool = False
    channels_last: bool = False
    compiled: bool = False


FORMS = {
    "published": Form(),  # float32, contiguous.
    "channels_last": Form(channels_last=True),
    "compiled": Form(channels_last=True, compiled=True),
    "tf32": Form(tf32=True),
    "bf16": Form(tf32=True, bfloat16=True, channels_last=True),
    "bf16_compiled": Form(tf32=True, bfloat16=True, channels_last=True, compiled=True),
}


class Step:
    """Takes a step with a batch of `to_device` when called; returns the loss terms without waiting for the device."""

    def __init__(self, encoder: str, classes: int, form: Form, device: str, ohem_min_kept: int = 0):
        """Builds networks and optimizer; `ohem_min_kept` (per two images) makes L_x OHEM and selects every pixel."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = form.tf32
        torch.backends.cudnn.benchmark = True
        self.form, self.device, self.ohem_min_kept = form, device, ohem_min_kept
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        self.student = torch_twin.DeepLabV3Plus(encoder, classes).to(device, memory_format=layout).train()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        decoder = [p for name, p in self.student.named_parameters() if not name.startswith("backbone")]
        groups = [{"params": self.student.backbone.parameters(), "lr": 0.002}, {"params": decoder, "lr": 0.02}]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
        self._forward = torch.compile(self._losses) if form.compiled else self._losses

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        terms = self._forward(batch)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self.optimizer.step()
        self._update_ema()
        return {name: term.detach() for name, term in terms.items()}

    def _losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.form.bfloat16):
            with torch.no_grad():
                weak, partner = self.teacher(torch.cat([batch["u"], batch["m"]])).chunk(2)
            logits, *copies = self.student(torch.cat([batch["x"], batch["u"]]), views=2)
            strong = self.student(torch.cat([batch["s1"], batch["s2"]])).chunk(2)
        labeled, student = logits.float().split([len(batch["x"]), len(batch["u"])])
        feature = [copy.float()[len(batch["x"]) :] for copy in copies]
        strong, weak, partner = [each.float() for each in strong], weak.float(), partner.float()
        terms = {"loss_x": labeled_term(labeled, batch["label"], self.ohem_min_kept)}
        select_all = self.ohem_min_kept > 0
        for i, view in enumerate(strong, 1):
            box = batch[f"box{i}"]
            mixed = torch.where(box[:, None], partner, weak)
            valid = torch.where(box, batch["valid_m"], batch["valid_u"])
            terms[f"loss_s{i}"] = consistency(view, mixed, valid, select_all)
        for i, view in enumerate(feature, 1):
            terms[f"loss_fp{i}"] = consistency(view, student.detach(), batch["valid_u"], select_all)
        terms["contrast_image"], terms["contrast_feature"] = contrast(*strong), contrast(*feature)
        views = terms["loss_s1"] + terms["loss_s2"] + terms["loss_fp1"] + terms["loss_fp2"]
        contrasts = terms["contrast_image"] + terms["contrast_feature"]
        return {"loss": 0.5 * (terms["loss_x"] + 0.25 * views + 0.01 * contrasts), **terms}

    @torch.no_grad()
    def _update_ema(self, decay: float = 0.996) -> None:
        pairs = zip(self.teacher.state_dict().values(), self.student.state_dict().values(), strict=True)
        old, new = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
        torch._foreach_lerp_(list(old), list(new), 1 - decay)


def labeled_term(logits: torch.Tensor, label: torch.Tensor, ohem_min_kept: int) -> torch.Tensor:
    """Returns the cross-entropy (Eq. 2), or with `ohem_min_kept` OHEM over groups of two images (Eq. 3)."""
    if not ohem_min_kept:
        return F.cross_entropy(logits, label, ignore_index=IGNORE)
    groups = zip(logits.split(2), label.split(2), strict=True)
    return torch.stack([ohem(*group, 0.7, ohem_min_kept) for group in groups]).mean()


def consistency(logits: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, select_all: bool) -> torch.Tensor:
    """Returns the cross-entropy to the argmax of the logits `teacher` (Eq. 4), on class-aware (Eq. 6) or all pixels."""
    selected = valid
    if not select_all:
        probabilities = teacher.softmax(1)
        largest = probabilities.amax((2, 3), keepdim=True)
        gamma = torch.where(largest > 0.92, 0.96 * largest, largest)
        selected = (probabilities > gamma).any(1) & valid
    loss = F.cross_entropy(logits, teacher.argmax(1), reduction="none")
    return (loss * selected).sum() / valid.sum().clamp(min=1)


def ohem(logits: torch.Tensor, label: torch.Tensor, threshold: float, min_kept: int) -> torch.Tensor:
    """Returns the cross-entropy of the hard pixels of a group (Eq. 3)."""
    valid = label != IGNORE
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    probability = torch.where(valid, torch.exp(-loss.detach()), 1.0)
    ordered = probability.flatten().sort().values
    limit = ordered[min(min_kept, len(ordered)) - 1].clamp(min=threshold)
    kept = valid & ((probability <= limit) | (valid.sum() < min_kept))
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared difference of logits standardized over the classes (Eq. 5)."""
    a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (a, b))
    return (a - b).square().mean()


def to_device(arrays: dict, form: Form, device: str) -> dict[str, torch.Tensor]:
    """Copies NumPy arrays to the device: images float32 [N, H, W, 3] as NCHW, labels as int64, masks unchanged."""
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    batch = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array).to(device)
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        batch[name] = tensor.long() if name == "label" else tensor
    return batch
