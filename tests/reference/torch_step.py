"""The whole training step of DSSN in PyTorch, written from `method.md`: what `benchmarks.step` compares ours with.

Same work as ours but for the strong views' colors, which its batch holds ready-made, as the original's loaders make
them: the teacher labels both weak views in one forward, the student sees labeled and weak images with two perturbed
copies of the features, then both strong views; all loss terms; SGD in two groups; moving average of the teacher.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F

from tests.reference import torch_twin

IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run the step."""

    tf32: bool = False
    bfloat16: bool = False
    channels_last: bool = False
    compiled: bool = False


FORMS = {
    "published": Form(),  # float32, contiguous.
    "tf32": Form(tf32=True),
    "bf16": Form(tf32=True, bfloat16=True, channels_last=True),
    "bf16_compiled": Form(tf32=True, bfloat16=True, channels_last=True, compiled=True),
}


class Step:
    """Call it with a batch of `batch_of`; it takes one step and returns the terms (on the device, not waited for)."""

    def __init__(self, backbone: str, classes: int, form: Form, device: str, ohem_min_kept: int = 0, lr=(0.002, 0.02)):
        """`ohem_min_kept` (of a group of two images) makes the labeled term OHEM and selects every pixel."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = form.tf32
        torch.backends.cudnn.benchmark = True
        self.form, self.device, self.ohem_min_kept = form, device, ohem_min_kept
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        self.student = torch_twin.DeepLabV3Plus(backbone, classes).to(device, memory_format=layout).train()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        outside = [p for name, p in self.student.named_parameters() if not name.startswith("backbone")]
        groups = [{"params": self.student.backbone.parameters(), "lr": lr[0]}, {"params": outside, "lr": lr[1]}]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
        self._forward = torch.compile(self._losses) if form.compiled else self._losses

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        terms = self._forward(batch)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self.optimizer.step()
        self._move_teacher()
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
    def _move_teacher(self, keep: float = 0.996) -> None:
        pairs = zip(self.teacher.state_dict().values(), self.student.state_dict().values(), strict=True)
        old, new = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
        torch._foreach_lerp_(list(old), list(new), 1 - keep)


def labeled_term(logits: torch.Tensor, label: torch.Tensor, ohem_min_kept: int) -> torch.Tensor:
    """Cross-entropy, or with `ohem_min_kept` that of the hard pixels of groups of two images."""
    if not ohem_min_kept:
        return F.cross_entropy(logits, label, ignore_index=IGNORE)
    groups = zip(logits.split(2), label.split(2), strict=True)
    return torch.stack([ohem(*group, 0.7, ohem_min_kept) for group in groups]).mean()


def consistency(logits: torch.Tensor, labeler: torch.Tensor, valid: torch.Tensor, select_all: bool) -> torch.Tensor:
    """Cross-entropy to the argmax of `labeler`, where class-aware selection (or all) and `valid` say so."""
    selected = valid
    if not select_all:
        probabilities = labeler.softmax(1)
        largest = probabilities.amax((2, 3), keepdim=True)
        gamma = torch.where(largest > 0.92, 0.96 * largest, largest)
        selected = (probabilities > gamma).any(1) & valid
    loss = F.cross_entropy(logits, labeler.argmax(1), reduction="none")
    return (loss * selected).sum() / valid.sum().clamp(min=1)


def ohem(logits: torch.Tensor, label: torch.Tensor, threshold: float, min_kept: int) -> torch.Tensor:
    """Cross-entropy of hard pixels of a group: method.md, "Loss"."""
    valid = label != IGNORE
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    probability = torch.where(valid, torch.exp(-loss.detach()), 1.0)
    ordered = probability.flatten().sort().values
    limit = ordered[min(min_kept, len(ordered)) - 1].clamp(min=threshold)
    kept = valid & ((probability <= limit) | (valid.sum() < min_kept))
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of logits standardized over the classes."""
    a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (a, b))
    return (a - b).square().mean()


def batch_of(arrays: dict, form: Form, device: str) -> dict[str, torch.Tensor]:
    """Brings NumPy arrays to the device: images float32 [N, H, W, 3] as NCHW, labels as int64, masks as they are."""
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    batch = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array).to(device)
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        batch[name] = tensor.long() if name == "label" else tensor
    return batch
