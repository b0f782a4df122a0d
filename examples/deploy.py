"""Saves a merging VideoMAE, runs it in fresh processes, and compares: three forms for processes that do not have this
package, and one that runs its kernels where it is.

python examples/deploy.py --format pt2 aoti onnx kernels --folder deployed
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from clips import arguments, clip, videomae

import sttm_kernels as sttm
from sttm_kernels import export

FILES = {"pt2": "plain.pt2", "aoti": "plain_compiled.pt2", "onnx": "model.onnx", "kernels": "kernels_compiled.pt2"}
WITHOUT = "sys.modules['sttm_kernels'] = None  # as where it is not installed"
COMPILED = "program = torch._inductor.aoti_load_package(path)"
LOAD = {
    "pt2": f"{WITHOUT}\nprogram = torch.export.load(path).module()",
    "aoti": f"{WITHOUT}\n{COMPILED}",
    "onnx": f"{WITHOUT}\nimport onnxruntime\nsession = onnxruntime.InferenceSession(path)\n"
    "program = lambda clip: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: clip.numpy()})[0])",
    "kernels": f"import sttm_kernels  # its operators\n{COMPILED}",
}
ELSEWHERE = """
import sys
import torch
path, given, results = sys.argv[1:]
{load}
with torch.inference_mode():
    torch.save([program(clip) for clip in torch.load(given)], results)
"""


class Logits(torch.nn.Module):
    """A model of transformers with a tensor for a result."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.model(clip).logits


def save(how: str, program: torch.export.ExportedProgram, path: Path) -> None:
    if how == "pt2":
        torch.export.save(export.decompose(program), path)
    elif how == "onnx":
        export.to_onnx(program).save(path)
    else:
        compiled = export.decompose(program) if how == "aoti" else program
        torch._inductor.aoti_compile_and_package(compiled, package_path=str(path))


def run_elsewhere(how: str, path: Path, clips: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a fresh process."""
    given, results = path.with_suffix(".clips"), path.with_suffix(".results")
    torch.save(clips, given)
    subprocess.run([sys.executable, "-c", ELSEWHERE.format(load=LOAD[how]), path, given, results], check=True)
    return torch.load(results)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--format", nargs="+", choices=LOAD, default=list(LOAD))
    parser.add_argument("--folder", type=Path, default=Path("deployed"), help="where the programs go")
    options = parser.parse_args(argv)
    options.folder.mkdir(exist_ok=True)
    model = videomae(options.model, options.device)
    frames = clip(model).contiguous()  # AOTInductor takes inputs to have the strides of the example, without a word
    network = Logits(sttm.apply(model, r=options.r))

    # Exported with a batch of two: one would be taken for a constant.
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (torch.cat([frames, frames.flip(1)]),), dynamic_shapes=({0: batch},))
        clips = [frames, torch.cat([frames, frames.flip(1), frames.flip(-1)])]
        expected = [network(each) for each in clips]
    for how in options.format:
        path = options.folder / FILES[how]
        save(how, program, path)
        found = run_elsewhere(how, path, clips)
        for each, result, wanted in zip(clips, found, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)
            difference, largest = float((result - wanted).abs().max()), float(wanted.abs().max())
            print(f"{how:<7} {path}: a batch of {len(each)} differs by {difference:.1e} of {largest:.2f}")


if __name__ == "__main__":
    main()
