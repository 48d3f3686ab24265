"""A photo in, facts out: uint8 [n, 260, 260, 3] RGB and a face heat map → FactsBatch.

All thresholds live here, outside of what is trained; README.md says on which photos they were
chosen. "Weak" classes are those that drawings, textures and blurs fall into, so they need more.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .facts import COLORS, MANY_FACES, NO_COLOR, FactsBatch, Tone, Verdict
from .names import NO_KIND, vocabulary
from .tower import INPUT_PX, EfficientNetLite2

# Normalisation of the EfficientNet-Lite checkpoints (tensorflow/tpu, efficientnet/lite).
MEAN, SPREAD = 127.0, 128.0
TEMPERATURE = 0.7  # sharpens the classifier, which was trained with label smoothing
SURE, WEAK_SURE = 0.93, 0.985  # probability of the best name
PROBABLY, WEAK_PROBABLY = 0.6, 0.93
KIND, GROUP = 0.65, 0.65  # probability of all names of one kind or group
PLAIN_CONTRAST = 2.5  # greatest spread of a colour channel between cells, 0..255

CELL_PX = 20  # colours are averaged in 13 × 13 cells
SOFTNESS = 150.0  # of the assignment to prototypes, in squared Lab units
OTHER_COLOR, BACKGROUND = 0.22, 0.55  # least share of the picture
BEHIND_SUBJECT = 0.3  # weight that the background's colour keeps in the middle
MONOCHROME_CHROMA = 3.0  # greatest distance from gray, Lab units
DARK, BRIGHT = 22.0, 82.0  # mean lightness, 0..100
FACE_HEAT = 0.55
# sRGB prototypes of the eleven basic colour terms (Berlin and Kay), several to a term.
PROTOTYPES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("black", (12, 12, 12)), ("black", (38, 36, 38)), ("black", (28, 24, 20)),
    ("white", (248, 248, 248)), ("white", (228, 228, 226)),
    ("gray", (75, 75, 77)), ("gray", (110, 110, 110)), ("gray", (150, 150, 150)),
    ("gray", (190, 190, 190)),
    ("red", (200, 30, 35)), ("red", (140, 20, 28)), ("red", (225, 60, 55)),
    ("orange", (240, 130, 30)), ("orange", (215, 105, 25)), ("orange", (250, 165, 70)),
    ("yellow", (245, 225, 50)), ("yellow", (220, 200, 40)), ("yellow", (250, 240, 140)),
    ("green", (50, 130, 50)), ("green", (30, 75, 30)), ("green", (110, 160, 60)),
    ("green", (140, 200, 110)), ("green", (95, 115, 55)), ("green", (60, 150, 110)),
    ("green", (55, 70, 35)),
    ("blue", (40, 80, 180)), ("blue", (20, 40, 100)), ("blue", (90, 150, 220)),
    ("blue", (150, 190, 230)), ("blue", (60, 110, 150)), ("blue", (40, 165, 195)),
    ("purple", (110, 50, 150)), ("purple", (70, 30, 90)), ("purple", (160, 110, 200)),
    ("pink", (240, 150, 180)), ("pink", (220, 80, 150)), ("pink", (250, 200, 205)),
    ("brown", (110, 70, 35)), ("brown", (70, 45, 25)), ("brown", (150, 105, 65)),
    ("brown", (185, 145, 105)), ("brown", (90, 60, 50)), ("brown", (210, 180, 140)),
)  # fmt: skip


class Observer(nn.Module):
    classes_of: Tensor
    same_kind: Tensor
    same_group: Tensor
    weak: Tensor
    prototypes: Tensor
    prototype_color: Tensor
    centre_weight: Tensor
    border: Tensor

    def __init__(self, classifier: EfficientNetLite2) -> None:
        super().__init__()
        self.classifier = classifier
        words = vocabulary()
        n = len(words.concepts)
        self.register_buffer("classes_of", _classes_of(words.concept_of_class, n))
        kinds = torch.tensor([words.kinds.index(c.kind) for c in words.concepts])
        groups = torch.tensor([words.groups.index(c.group) for c in words.concepts])
        kind_table = F.one_hot(kinds, len(words.kinds)).float()  # [concepts, kinds]
        kind_table[:, words.kinds.index(NO_KIND)] = 0
        group_table = F.one_hot(groups, len(words.groups)).float()
        group_table[:, words.groups.index("object")] = 0
        self.register_buffer("same_kind", kind_table)
        self.register_buffer("same_group", group_table)
        self.register_buffer("weak", torch.tensor([c.role == "weak" for c in words.concepts]))
        rgb = torch.tensor([value for _, value in PROTOTYPES]).float() / 255
        self.register_buffer("prototypes", lab(rgb))  # float32 [prototypes, 3]
        index = torch.tensor([COLORS.index(name) for name, _ in PROTOTYPES])
        self.register_buffer("prototype_color", F.one_hot(index, len(COLORS)).float())
        self.register_buffer("centre_weight", _centre_weight(INPUT_PX // CELL_PX))
        self.register_buffer("border", _border(INPUT_PX // CELL_PX))

    def forward(self, pixels: Tensor, heat: Tensor) -> FactsBatch:
        """`pixels` uint8 [n, 260, 260, 3]; `heat` float32 [n, 1, h, w], 1 where a face is."""
        x = pixels.permute(0, 3, 1, 2).float()  # float32 [n, 3, 260, 260], 0..255
        verdict, first, second = self.subject(self.probabilities(x))
        cells = F.avg_pool2d(x, CELL_PX).flatten(2).transpose(1, 2)  # float32 [n, 169, 3]
        plain = cells.std(1).amax(1) < PLAIN_CONTRAST
        verdict = torch.where(plain, torch.full_like(verdict, int(Verdict.PLAIN)), verdict)
        color, other, background, tone = self.colors(cells)
        return FactsBatch(verdict, first, second, faces(heat), color, other, background, tone)

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the concepts, float32 [n, concepts]."""
        logits = self.classifier((x - MEAN) / SPREAD)  # float32 [n, 1000]
        p = F.pad((logits / TEMPERATURE).softmax(-1), (0, 1))  # the last is nobody's class
        return p[:, self.classes_of].sum(-1)

    def subject(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Verdict, first and second concept, int64 [n] each."""
        best, first = p.max(-1)
        weak = self.weak[first]
        of_kind, kind = (p @ self.same_kind).max(-1)
        of_group, group = (p @ self.same_group).max(-1)
        sure = best >= torch.where(weak, WEAK_SURE, SURE)
        probably = best >= torch.where(weak, WEAK_PROBABLY, PROBABLY)
        verdict = torch.full_like(first, int(Verdict.UNSURE))
        verdict = torch.where(of_group >= GROUP, int(Verdict.GROUP), verdict)
        verdict = torch.where(of_kind >= KIND, int(Verdict.KIND), verdict)
        verdict = torch.where(probably, int(Verdict.PROBABLY), verdict)
        verdict = torch.where(sure, int(Verdict.SURE), verdict)
        in_kind, in_group = self.same_kind.T[kind], self.same_group.T[group]  # [n, concepts]
        by_kind = (verdict == int(Verdict.KIND))[:, None]
        by_group = (verdict == int(Verdict.GROUP))[:, None]
        allowed = torch.where(by_kind, in_kind, torch.where(by_group, in_group, 1.0))
        # The added constant keeps members of probability 0 ahead of what is not allowed.
        two = ((p + 1) * allowed).topk(2, -1).indices
        return verdict, two[:, 0], two[:, 1]

    def colors(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Main, other and background colour and tone of float32 [n, cells, 3]; int64 [n] each."""
        values = lab(cells / 255)
        distance = (values[:, :, None] - self.prototypes).square().sum(-1)
        share = (-distance / SOFTNESS).softmax(-1) @ self.prototype_color  # [n, cells, 11]
        edge, edge_color = (share * self.border[:, None]).sum(1).max(-1)
        background = torch.where(edge >= BACKGROUND, edge_color, NO_COLOR)
        # What the border is made of counts less in the middle, where the subject is.
        behind = F.one_hot(background, NO_COLOR + 1)[:, :NO_COLOR]
        subject = (share * self.centre_weight[:, None]).sum(1)
        subject = subject * (1 - (1 - BEHIND_SUBJECT) * behind)
        top, color = (subject / subject.sum(-1, keepdim=True)).topk(2, -1)
        other = torch.where(top[:, 1] >= OTHER_COLOR, color[:, 1], NO_COLOR)
        light = values[..., 0].mean(1)
        chroma = values[..., 1:].square().sum(-1).amax(1).sqrt()
        tone = torch.where(light < DARK, int(Tone.DARK), torch.full_like(edge_color, 0))
        tone = torch.where(light > BRIGHT, int(Tone.BRIGHT), tone)
        tone = torch.where(chroma < MONOCHROME_CHROMA, int(Tone.MONOCHROME), tone)
        return color[:, 0], other, background, tone


def _classes_of(concept_of_class: tuple[int, ...], n: int) -> Tensor:
    """ImageNet classes of each concept, int64 [concepts, most], padded with one past the last."""
    classes: list[list[int]] = [[] for _ in range(n)]
    for index, concept in enumerate(concept_of_class):
        classes[concept].append(index)
    most = max(len(own) for own in classes)
    nobody = len(concept_of_class)
    return torch.tensor([own + [nobody] * (most - len(own)) for own in classes])


def faces(heat: Tensor) -> Tensor:
    """Peaks of the heat map, at most MANY_FACES, int64 [n]."""
    peaks = (heat >= F.max_pool2d(heat, 5, 1, 2)) & (heat > FACE_HEAT)
    return peaks.sum((1, 2, 3)).clamp(max=MANY_FACES)


def lab(rgb: Tensor) -> Tensor:
    """sRGB 0..1 → CIE L*a*b* (D65), last axis 3. Constants of IEC 61966-2-1 and CIE 15."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = rgb.new_tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / rgb.new_tensor([0.95047, 1.0, 1.08883])
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-6) ** (1 / 3), xyz * 7.787 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _centre_weight(side: int) -> Tensor:
    """A round hill over side × side cells that sums to 1: subjects are mostly in the middle."""
    at = (torch.arange(side) + 0.5) / side - 0.5
    hill = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 0.22**2)).flatten()
    return hill / hill.sum()


def _border(side: int) -> Tensor:
    ring = torch.ones(side, side)
    ring[2:-2, 2:-2] = 0
    ring[-2:, 2:-2] = 0  # the bottom is foreground more often than not
    return ring.flatten() / ring.sum()
