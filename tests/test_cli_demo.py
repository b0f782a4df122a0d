"""`sttm-kernels demo`: the picture and what is printed, clips of every kind, and input that cannot be used."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import sttm_kernels
from sttm_kernels import MergePlan, dispatch
from sttm_kernels.cli import main
from sttm_kernels.demo import classifier, merging, picture, result, shapes, video
from sttm_kernels.demo.tokens import dominant, lab, mean_colours, patch_tokens

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")
numpy = pytest.importorskip("numpy")

PATCH = 8
CLIPS = Path(__file__).parents[2] / "shared" / "data"
NOTES = "not a video\n" * 50


def encode(path: Path, frames: Any, codec: str = "mpeg4", **stream_options: Any) -> Path:
    """Writes uint8 (T, H, W, 3) as a video at 25 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"ffv1": "yuv444p", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for name, value in stream_options.items():
            setattr(stream, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def boxes(frames: int, height: int, width: int, ground: int = 90) -> Any:
    """A bright box that moves over a plain ground."""
    clip = numpy.full((frames, height, width, 3), ground, dtype=numpy.uint8)
    side = max(2, min(height, width) // 4)
    for t in range(frames):
        left = (width - side) * t // max(1, frames - 1)
        clip[t, side : 2 * side, left : left + side] = (230, 60, 40)
    return clip


def frames_of(clip: video.Clip) -> list[int]:
    """Their numbers in a video of 25 a second."""
    return [round(time * 25) for time in clip.times]


@pytest.fixture
def draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str, Path]]:
    """Runs the demo with a picture in tmp_path; gives the exit code, stdout, stderr and the picture's path."""

    def run(*arguments: str) -> tuple[int, str, str, Path]:
        out = tmp_path / "picture.png"
        code = main(["demo", "--out", str(out), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, out

    return run


def assert_drawn(path: Path) -> None:
    with Image.open(path) as image:
        assert min(image.size) > 200
        colours = image.convert("RGB").resize((200, 200)).getcolors(200 * 200)
    assert len(colours) > 50


# The rendered clip and the paths of its objects


def merged_shapes(seed: int) -> tuple[Any, merging.Stage, merging.Stage, MergePlan]:
    """The clip at 16 frames, both stages, and the plan from its final groups to the objects (-1: background).

    A group is an object's if most of its patches are.
    """
    clip = shapes.render(16, seed)
    x, grid = patch_tokens(clip.frames, PATCH)
    spatial, temporal = merging.merge_clip(x, grid, 0.25, result.GROUPS, "auto")
    whole = sttm_kernels.compose(spatial.plan, temporal.plan)
    inside = torch.nn.functional.avg_pool2d(clip.inside.float(), PATCH).permute(0, 2, 3, 1).reshape(1, -1, 3)
    share = sttm_kernels.merge((inside > 0.5).float(), whole).x[0]
    owner = torch.where(share.amax(1) > 0.5, share.argmax(1), -1)
    return clip, spatial, temporal, MergePlan(owner[None].to(torch.int32), 3)


def distance_from_truth(paths: torch.Tensor, clip: Any) -> torch.Tensor:
    """(objects, frames), in patches; the middle of the first patch is at position 0."""
    truth = clip.centres.transpose(0, 1) / PATCH - 0.5
    return (paths - truth).norm(dim=-1)


@pytest.mark.parametrize("seed", range(4))
def test_paths_of_aggregated_positions_follow_the_objects(seed: int) -> None:
    clip, spatial, temporal, to_object = merged_shapes(seed)
    objects = sttm_kernels.compose(temporal.plan, to_object)
    tokens = spatial.tokens

    aggregated = merging.centres(tokens.positions, objects, 16, tokens.size)
    assert distance_from_truth(aggregated, clip).max() < 1

    # Without aggregation a merged token has no better position than that of one of its own.
    whole = sttm_kernels.compose(spatial.plan, objects)
    every = torch.cartesian_prod(*(torch.arange(float(extent)) for extent in (16, 27, 48)))[None]
    kept = merging.centres(every, whole, 16, reduce="first")
    assert distance_from_truth(kept, clip).max() > 1


def test_every_shape_is_one_group_through_the_clip() -> None:
    clip, spatial, temporal, to_object = merged_shapes(0)
    label = sttm_kernels.compose(spatial.plan, sttm_kernels.compose(temporal.plan, to_object)).index.view(16, 27, 48)
    sizes = temporal.tokens.size[0]
    for k in range(3):
        assert (label == k).any((1, 2)).all(), f"{clip.names[k]} is lost in some frame"
        mine = sizes[to_object.index[0] == k]
        assert mine.max() > 0.9 * mine.sum(), f"{clip.names[k]} is divided"


def test_shapes_know_their_centres() -> None:
    clip = shapes.render(5, seed=3)
    y, x = torch.arange(shapes.HEIGHT) + 0.5, torch.arange(shapes.WIDTH) + 0.5
    mass = clip.inside.sum((2, 3))
    centre = torch.stack(((clip.inside.sum(3) * y).sum(2) / mass, (clip.inside.sum(2) * x).sum(2) / mass), -1)
    assert (centre - clip.centres).abs().max() < 0.6
    assert not (clip.inside.sum(1) > 1).any()
    assert torch.equal(clip.frames, shapes.render(5, seed=3).frames)
    assert not torch.equal(clip.frames, shapes.render(5, seed=4).frames)


def test_centres_by_hand() -> None:
    positions = torch.tensor([[[0.0, 1, 1], [0, 3, 1], [0, 9, 9], [1, 0, 4], [1, 0, 8], [1, 7, 7]]])
    size = torch.tensor([[1.0, 3, 1, 1, 1, 0]])
    plan = MergePlan(torch.tensor([[0, 0, -1, 0, 0, 1]], dtype=torch.int32), 2)
    mean = merging.centres(positions, plan, 2, size)
    assert mean[0].tolist() == [[2.5, 1.0], [0.0, 6.0]]
    assert mean[1].isnan().all()
    assert merging.centres(positions, plan, 2, size, reduce="first")[0].tolist() == [[1.0, 1.0], [0.0, 4.0]]


def test_a_group_moves_if_it_leaves_its_place() -> None:
    label = torch.zeros(4, 3, 4, dtype=torch.int64)
    for t in range(4):
        label[t, 1, t] = 1
    label[:, 2] = 2
    groups = picture.Groups(label, torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, 4, 2))
    assert groups.moves().tolist() == [False, True, False, False]


def test_a_group_has_its_mean_colour_and_one_border_colour_through_time() -> None:
    label = torch.zeros(2, 4, 8, dtype=torch.int64)
    label[0, :, :4] = 1
    label[1, :, :6] = 1
    groups = picture.Groups(
        label, torch.tensor([[10, 20, 30], [200, 180, 160]]).byte(), torch.full((2, 2, 2), torch.nan)
    )
    borders = picture.border_colours(groups)
    assert (borders[0] != borders[1]).any()
    for frame, edge in ((0, 4), (1, 6)):
        pixels = torch.from_numpy(numpy.array(picture.overlay(groups, borders, frame, 20))).int()
        assert pixels.shape == (80, 160, 3)
        for group, inner, outer in ((1, edge * 20 - 10, edge * 20 - 1), (0, edge * 20 + 10, edge * 20)):
            assert (pixels[40, inner] - groups.colours[group].int()).abs().max() <= 2
            assert (pixels[40, outer] - borders[group].int()).abs().max() <= 40


# Tokens


def test_lab_of_known_colours() -> None:
    rgb = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.2, 80.1, 67.2], [32.3, 79.2, -107.9]])
    assert (lab(rgb) - expected).abs().max() < 0.1


def test_the_dominant_colour_is_no_mixture() -> None:
    colours = torch.tensor([[1.0, 0, 0]] * 5 + [[0, 1, 0]] * 3)[None]
    assert dominant(colours).tolist() == [[1.0, 0.0, 0.0]]
    assert dominant(torch.full((2, 4, 3), 0.5)).tolist() == [[0.5] * 3] * 2


def test_patch_tokens_are_row_after_row() -> None:
    frames = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    frames[1, 2:, 4:] = 200
    x, grid = patch_tokens(frames, 2)
    assert grid == (2, 2, 3)
    assert x.shape == (1, 12, 3)
    assert (x[0] - x[0, 0]).norm(dim=-1).nonzero().flatten().tolist() == [11]
    assert mean_colours(frames, 2)[0].nonzero()[:, 0].unique().tolist() == [11]


# Pictures and what is printed


def test_without_a_video_it_draws_the_moving_shapes(draw: Callable[..., Any], tmp_path: Path) -> None:
    gif = tmp_path / "moving.gif"
    code, out, err, path = draw("--gif", str(gif), "--frames", "3", "--step", "0.8")
    assert (code, err) == (0, "")
    assert "3 frames from 0.00 to 1.60 s, one every 0.8 s" in out
    assert re.search(r"spatial +3888 to 972 tokens.* ms", out)
    assert re.search(r"temporal +972 to 16 tokens.* ms", out)
    assert f"{dispatch.choose('assign_merge', 'cpu', torch.float32)} on cpu" in out
    assert "ViT-B       3888 tokens, unmerged: 1.22 TFLOP" in out
    assert re.search(r"1944 tokens, a half, as classifiers keep: 470 GFLOP a clip, 61.* % saved", out)
    assert re.search(r"16 tokens, as drawn: .* % saved; so few are for the eye, not for a classifier", out)
    assert re.search(r"clip's 196 tokens, on one CPU thread: \d+ ms; merged to 98 behind the first block: \d+ ms", out)
    assert str(path) in out
    assert str(gif) in out
    histogram = re.findall(r"^ +(?:\d+|\d+ to \d+|empty)  +(\d+)(?:  #+)?$", out, re.MULTILINE)
    assert sum(map(int, histogram)) == 16
    assert_drawn(path)
    with Image.open(gif) as moving:
        assert moving.n_frames == 3


def test_the_flops_are_those_of_the_blocks() -> None:
    from sttm_kernels.nn.flops import flops
    from sttm_kernels.nn.video_transformer import Block

    assert classifier.vit_flops(50, dim=64, depth=1) == flops(Block(64, 4, 4.0, "off"), (1, 50, 64))


def test_the_vit_that_is_timed_keeps_a_half_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Recording(classifier.VideoTransformer):
        def features(self, clip: torch.Tensor) -> sttm_kernels.MergedTokens:
            tokens = super().features(clip)
            seen.append(tokens.x.shape[1])
            return tokens

    monkeypatch.setattr(classifier, "VideoTransformer", Recording)
    monkeypatch.setattr(classifier, "SIDE", 64)
    frames = torch.randint(256, (5, 40, 60, 3), dtype=torch.uint8)
    measured = classifier.measure(frames, "auto", torch.device("cpu"))
    assert measured.tokens == 32
    assert seen == [33, 17] * 3
    assert min(measured.unmerged, measured.merged) > 0


def test_explicit_implementation_and_keeps(draw: Callable[..., Any]) -> None:
    keeps = ("--spatial-keep", "40", "--temporal-keep", "0.1")
    code, out, _, path = draw("--frames", "2", "--impl", "reference", *keeps)
    assert code == 0
    assert re.search(r"2592 to 80 tokens", out)
    assert re.search(r"80 to 8 tokens", out)
    assert "reference on cpu" in out
    assert_drawn(path)


@pytest.mark.parametrize(
    ("frames", "height", "width", "arguments"),
    [
        pytest.param(1, 96, 128, (), id="one frame"),
        pytest.param(5, 97, 131, (), id="odd resolution"),
        pytest.param(3, 2160, 3840, (), id="4K"),
        pytest.param(3, 10, 16, (), id="tiny"),
        pytest.param(
            9, 96, 128, ("--start", "0.08", "--frames", "50", "--step", "0.12", "--patch", "16"), id="a piece"
        ),
    ],
)
def test_clips_of_every_shape_work(
    draw: Callable[..., Any], tmp_path: Path, frames: int, height: int, width: int, arguments: tuple[str, ...]
) -> None:
    codec = "ffv1" if height % 2 else "mpeg4"
    clip = encode(tmp_path / "clip.mkv", boxes(frames, height, width), codec)
    code, out, err, path = draw(str(clip), *arguments)
    assert (code, err) == (0, "")
    assert f"{width} x {height} as" in out
    assert_drawn(path)
    if arguments:
        assert "3 frames from 0.08 to 0.32 s, one every 0.12 s" in out


def test_the_first_scene_ends_at_the_cut(tmp_path: Path) -> None:
    scenes = numpy.concatenate([boxes(12, 72, 96, ground=20), boxes(12, 72, 96, ground=220)])
    clip = str(encode(tmp_path / "cut.mp4", scenes))
    assert frames_of(video.read(clip, PATCH)) == list(range(12))
    assert frames_of(video.read(clip, PATCH, start=0.48)) == list(range(12, 24))
    assert frames_of(video.read(clip, PATCH, start=0.2, frames=15)) == list(range(5, 20))
    assert frames_of(video.read(clip, PATCH, step=0.2)) == [0, 5, 10]


def test_a_long_scene_is_read_in_longer_steps(tmp_path: Path) -> None:
    clip = str(encode(tmp_path / "long.mp4", boxes(50, 48, 64)))
    assert frames_of(video.read(clip, PATCH)) == list(range(0, 48, 3))


# Films as they are


def levels(path: Path, times: list[int], **how: Any) -> Path:
    """Writes a frame at each of these times, in milliseconds, in greys that say which it is: 10, 20, 30."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25, time_base=Fraction(1, 1000))
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        for number, time in enumerate(times, 1):
            grey = numpy.full((32, 32, 3), 10 * number, dtype=numpy.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_are_those_on_the_screen_at_equal_steps_of_time(tmp_path: Path) -> None:
    film = str(levels(tmp_path / "variable.mkv", [0, 40, 80, 120, 160, 1000, 1040, 4800, 4840]))

    def shown(**how: Any) -> list[tuple[float, int]]:
        clip = video.read(film, PATCH, **how)
        greys = [round(float(frame.float().mean()) / 10) for frame in clip.frames]
        return list(zip([round(time, 3) for time in clip.times], greys, strict=True))

    assert shown(frames=4, step=1.6) == [(0, 1), (1.6, 7), (3.2, 7), (4.8, 8)]
    assert shown(frames=5, start=0.96) == [(0.96, 5), (1.0, 6), (1.04, 7), (1.08, 7), (1.12, 7)]
    assert shown(frames=9, start=4.82) == [(4.82, 8), (4.86, 9)]


def test_times_count_from_where_the_file_begins_and_are_rounded(tmp_path: Path) -> None:
    film = str(levels(tmp_path / "later.mkv", [5000 + round(number * 1000 / 30) for number in range(20)]))
    clip = video.read(film, PATCH, frames=20)
    assert [round(float(frame.float().mean()) / 10) for frame in clip.frames] == list(range(1, 21))
    assert clip.start == 0


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("down", [1, -1])
@pytest.mark.parametrize("across", [1, -1])
def test_films_are_turned_and_mirrored_as_they_ask_for(tmp_path: Path, across: int, down: int, lying: bool) -> None:
    pixels = numpy.full((1, 48, 64, 3), 40, dtype=numpy.uint8)
    pixels[:, :24, :32] = 120
    pixels[:, :12, :32] = 220
    as_stored = encode(tmp_path / "stored.mp4", pixels).read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (0, down, across, 0) if lying else (across, 0, 0, down)
    asked = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    track = as_stored.index(b"tkhd")
    film = tmp_path / "asked.mp4"
    film.write_bytes(as_stored[:track] + as_stored[track:].replace(plain, asked, 1))

    read = video.read(str(film), PATCH)
    assert read.source_size == ((48, 64) if lying else (64, 48))
    # Points of the file as seen from its middle, and where they are on the screen: at (a x + c y, b x + d y).
    height, width = read.frames.shape[1:3]
    for (x, y), grey in {(-16, -18): 220, (-16, -6): 120, (16, -18): 40, (16, 18): 40, (-16, 18): 40}.items():
        column = width // 2 + round((a * x + c * y) * width / read.source_size[0])
        row = height // 2 + round((b * x + d * y) * height / read.source_size[1])
        assert abs(int(read.frames[0, row, column, 0]) - grey) < 20


def test_a_film_that_was_cut_off_says_so(draw: Callable[..., Any], tmp_path: Path) -> None:
    for name, codec in (("cut.mkv", "ffv1"), ("cut.avi", "mjpeg")):
        whole = encode(tmp_path / name, boxes(20, 96, 128), codec)
        assert video.read(str(whole), PATCH, frames=30).notes == []
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
        read = video.read(str(whole), PATCH, frames=30)
        assert 5 < len(read.frames) < 20
        seconds = f"{0.04 * len(read.frames):.2f}"
        assert "that could be read of the 0.80 s that the file declares" in read.notes[-1]
        assert f"frames in the {seconds} s" in read.notes[-1]
    code, out, _, path = draw(str(whole), "--frames", "30")
    assert code == 0
    assert "it is cut off or damaged" in out
    assert_drawn(path)


def test_what_comes_after_damage_is_read(tmp_path: Path) -> None:
    film = encode(tmp_path / "film.mp4", boxes(50, 48, 64), "mjpeg")
    with av.open(str(film)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    whole, damaged = video.read(str(film), PATCH, frames=60), bytearray(film.read_bytes())
    for position, size in packets[18:23]:
        damaged[position : position + size] = bytes(size)
    film.write_bytes(damaged)
    clip = video.read(str(film), PATCH, frames=60)
    assert clip.notes == ["5 packets could not be decoded", "5 frames missing after that"]
    # The last one before the damage stays on the screen.
    assert torch.equal(clip.frames, whole.frames[[*range(18), *[17] * 5, *range(23, 50)]])


def test_a_folder_of_clips_is_drawn_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "clips", tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.mp4", "a.mp4"):
        encode(folder / name, boxes(2, 48, 64))
    (folder / "notes.txt").write_text(NOTES)
    assert main(["demo", str(folder), "--out", str(out), "--gif", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"sttm-kernels: passed over: {folder / 'notes.txt'} is a text file, not a video\n"
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["clip"] for line in lines] == ["a.mp4", "b.mp4"]
    for line in lines:
        assert line["tokens"] == {"before": 2072, "spatial": 518, "temporal": 16}
        assert sum(line["group_sizes"]) == 2072
        assert line["vit_b_flops"] == {
            "unmerged": classifier.vit_flops(2072),
            "half": classifier.vit_flops(1036),
            "drawn": classifier.vit_flops(16),
        }
        assert line["small_vit"].keys() == {"tokens", "unmerged", "merged", "where"}
        assert line["wrote"] == [str(out / f"{line['clip']}.png"), str(out / f"{line['clip']}.gif")]
        for path in line["wrote"]:
            with Image.open(path) as image:
                assert min(image.size) > 100


def test_the_aspect_ratio_is_kept_and_frames_are_whole_patches(tmp_path: Path) -> None:
    frames = video.read(str(encode(tmp_path / "wide.mp4", boxes(2, 90, 200))), PATCH).frames
    assert frames.shape == (2, 224, 496, 3)


def test_pixels_that_are_not_square_are_shown_so(tmp_path: Path) -> None:
    clip = encode(tmp_path / "wide.mkv", boxes(1, 48, 64), sample_aspect_ratio=Fraction(2, 1))
    read = video.read(str(clip), PATCH)
    assert read.source_size == (128, 48)
    assert read.frames.shape == (1, 224, 592, 3)


@pytest.mark.parametrize("name", ["bikes.mp4", "nasa_13013.mp4"])
def test_real_clips(draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if not (CLIPS / name).exists():
        pytest.skip(f"{name} is not in ../shared/data")
    drawn: list[picture.Groups] = []
    sheet = picture.sheet
    monkeypatch.setattr(picture, "sheet", lambda *given: drawn.append(given[1]) or sheet(*given))
    code, out, err, path = draw(str(CLIPS / name))
    assert (code, err) == (0, "")
    assert f"{name}, 16 frames from 0.00 to" in out
    assert_drawn(path)
    # The background stands still, and is most of either clip.
    label = drawn[0].label
    assert (label[1:] == label[:-1]).float().mean() > 0.9


# Input that cannot be used


def file(name: str, content: str) -> Callable[[Path], str]:
    """Makes a file of this content in a folder; gives its path."""

    def make(folder: Path) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    return make


def audio_only(folder: Path) -> str:
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return str(folder / "sound.wav")


def good_clip(folder: Path) -> str:
    return str(encode(folder / "good.mp4", boxes(4, 48, 64)))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda folder: str(folder / "missing.mp4"), (), "no such file: "),
        (
            lambda folder: str(Path(good_clip(folder)).parent),
            (),
            "--out must be a folder where the videos are those of a folder, got .*picture.png",
        ),
        (lambda folder: str((folder / "empty").mkdir() or folder / "empty"), (), "empty has no files"),
        (file("notes.txt", NOTES), (), "is a text file, not a video"),
        (file("notes.mp4", NOTES), (), "is not a video that FFmpeg can read"),
        (file("empty.mp4", ""), (), "is not a video that FFmpeg can read"),
        (file("none.y4m", "YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420jpeg\n"), (), "holds no video frame"),
        (audio_only, (), "has no video stream, only audio"),
        (good_clip, ("--start", "0.16"), "--start 0.16 is past the end of .*good.mp4, 0.16 s long"),
        (good_clip, ("--patch", "500"), "holds no patch of 500 pixels; --patch must be smaller"),
        (good_clip, ("--spatial-keep", "100000"), "--spatial-keep 100000 is more than the 1036 tokens of a frame"),
        (good_clip, ("--temporal-keep", "9999"), "--temporal-keep 9999 is more than the 1036 tokens that"),
        (good_clip, ("--gif", "movie.png"), "--gif must end in .gif, got movie.png"),
        (
            lambda folder: str(encode(folder / "narrow.mkv", boxes(2, 8, 2400))),
            (),
            "a frame holds no patch of 8 pixels",
        ),
        (None, ("--start", "2.56"), "--start 2.56 is past the end of the moving shapes, 2.56 s long"),
        (None, ("--start", "-1"), "argument --start: must be at least 0 seconds, got -1"),
        (None, ("--frames", "0"), "argument --frames: must be at least 1, got 0"),
        (None, ("--step", "0"), "argument --step: must be above 0 seconds, got 0"),
        (None, ("--step", "soon"), "argument --step: must be a number of seconds, got 'soon'"),
        (None, ("--patch", "0"), "argument --patch: must be at least 1, got 0"),
        (None, ("--patch", "eight"), "argument --patch: must be a whole number, got 'eight'"),
        (None, ("--spatial-keep", "1.5"), "argument --spatial-keep: as a fraction must be above 0 and at most 1.0"),
        (None, ("--spatial-keep", "-2"), "argument --spatial-keep: must be at least 1, got -2"),
        (None, ("--temporal-keep", "nan"), "argument --temporal-keep: as a fraction must be above 0"),
        (None, ("--temporal-keep", "few"), "must be a fraction like 0.25 or a count like 16, got 'few'"),
        (None, ("--impl", "magic"), "argument --impl: invalid choice: 'magic'"),
        (None, ("--device", "cuda", "--impl", "cuda"), "--device cuda: PyTorch finds no CUDA device"),
        (None, ("--device", "cpu", "--impl", "cuda"), "--impl cuda cannot run assign on cpu: "),
    ],
)
def test_bad_input_is_said_and_exits_with_2(
    draw: Callable[..., Any],
    tmp_path: Path,
    make: Callable[[Path], str] | None,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("has a GPU")
    given = [] if make is None else [make(tmp_path)]
    code, out, err, path = draw(*given, *arguments)
    assert code == 2
    assert re.search(message, err)
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert out == ""
    assert not path.exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/picture.png", "no such directory"),
        ("file/picture.png", "no such directory"),
        ("folder.png", "cannot write"),
        ("picture.xyz", "--out must end in .png or "),
    ],
)
def test_bad_output_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(shapes, "render", lambda *_: pytest.fail("it began to work"))
    assert main(["demo", "--out", str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert main(["demo", "--out", str(tmp_path / "picture.png"), "--frames", "1"]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("av", "PyAV"), ("PIL", "Pillow"), ("tqdm", "tqdm")])
def test_a_missing_extra_is_named(
    draw: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    clip = good_clip(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err, _ = draw(clip)
    assert code == 2
    assert f"the demo needs {package}" in err
    assert "pip install 'sttm_kernels[demo]'" in err


def test_as_a_module_it_has_the_same_exit_codes(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sttm_kernels", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)

    version = run("--version")
    assert (version.returncode, version.stdout.strip()) == (0, f"sttm-kernels {sttm_kernels.__version__}")
    bad = run("demo", str(tmp_path / "missing.mp4"), "--out", str(tmp_path / "picture.png"))
    assert bad.returncode == 2
    assert bad.stderr == f"sttm-kernels: error: no such file: {tmp_path / 'missing.mp4'}\n"
