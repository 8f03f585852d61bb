"""What a run tells of itself while it trains: metrics.jsonl, TensorBoard, sample videos and the progress bar.

metrics.jsonl   one JSON object a line, `step` first; numbers that are not finite are null
tensorboard/    the same scalars, and the sample videos as animations
samples/        step-<step>.mp4 (images: .png), a row a clip: the original, then 1, 4, 16 ... tokens
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from vtok.data.encode import write_video
from vtok.training.tracking import WandbRun


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """The system's errors of writing, which name no file, name this one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def plain(value: Any) -> Any:
    """A JSON-ready value: non-finite numbers become None, lists are walked."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class Curves:
    """Writes metrics of rank 0; the other ranks hold one with `folder=None`, which does nothing.

    Args:
        folder: the run directory.
        resumed: step the run goes on from: lines after it are dropped, since they will be written again.
        owed: the validation of that step will be written again too.
    """

    def __init__(
        self, folder: Path | None, *, resumed: int | None = None, owed: bool = False, tensorboard: bool = True
    ) -> None:
        self.folder, self.board, self.file = folder, None, None
        self.remote: WandbRun | None = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            keep_until(path, resumed if resumed is not None else -1, owed=owed)
        self.file = path.open("ab", buffering=0)  # what a full disk does not take is told once, not at the close again
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            purge = 0 if resumed is None else resumed + 1
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, flush_secs=30)

    def to_wandb(self, project: str, config: dict[str, Any]) -> None:
        """From now on every line and sample goes to Weights & Biases too."""
        if self.folder is not None:
            self.remote = WandbRun(project, folder=self.folder, config=config)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.file is None:
            return
        if self.remote is not None:
            self.remote.write(step, values)
        line = (json.dumps({"step": step, **{k: plain(v) for k, v in values.items()}}) + "\n").encode()
        with _naming(self.file.name):
            while line:
                line = line[self.file.write(line) :]
        if self.board is not None:
            for key, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self.board.add_scalar(key, value, step)
                elif isinstance(value, list) and value and all(isinstance(v, float) for v in value):
                    self.board.add_histogram(key, torch.tensor(value), step)

    def samples(self, step: int, titles: list[str], videos: list[Tensor], *, fps: float) -> Path | None:
        """Saves a grid of uint8 videos [B, C, T, H, W], one column a title, one row a clip."""
        if self.folder is None:
            return None
        grid = contact_sheet(videos)  # [T, H', W', 3]
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        (folder / "columns.txt").write_text("\n".join(titles) + "\n")
        still = grid.shape[0] == 1
        path = folder / f"step-{step:08d}.{'png' if still else 'mp4'}"
        aside = path.with_name(f".{path.name}")
        if still:
            from PIL import Image

            Image.fromarray(grid[0].numpy()).save(aside, format="PNG")
        else:
            height, width = grid.shape[1:3]  # 4:2:0, which every browser plays, holds even sizes only
            even = torch.nn.functional.pad(grid, (0, 0, 0, width % 2, 0, height % 2), value=255)
            write_video(aside, even, fps=fps, crf=15, container="mp4")
        os.replace(aside, path)
        if self.remote is not None:
            self.remote.file(step, path)
        if self.board is not None:
            self._animate(step, grid, fps)
        return path

    def texts(self, step: int, lines: list[str]) -> Path | None:
        """Saves lines of Markdown: what a model said beside the truth."""
        if self.folder is None:
            return None
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:08d}.md"
        text = "\n".join(lines) + "\n"
        path.write_text(text, encoding="utf-8")
        if self.board is not None:
            self.board.add_text("answers", text, step)
        return path

    def _animate(self, step: int, grid: Tensor, fps: float) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        assert self.board is not None
        frames = [Image.fromarray(f.numpy()) for f in grid]
        out = io.BytesIO()
        frames[0].save(out, format="GIF", save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)
        height, width = grid.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=out.getvalue())
        writer = self.board._get_file_writer()
        assert writer is not None
        writer.add_summary(Summary(value=[Summary.Value(tag="samples", image=image)]), step)

    def flush(self) -> None:
        """Everything written so far is on disk: before a checkpoint that says these steps are done."""
        if self.file is not None:
            with _naming(self.file.name):
                os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.board is not None:
            self.board.close()
            self.board = None
        if self.remote is not None:
            self.remote.close()
            self.remote = None


def keep_until(path: Path, step: int, *, owed: bool = False) -> None:
    """Drops the lines of a metrics.jsonl past `step`, the validation of `step` if `owed`, and a line cut by a kill."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            again = owed and row["step"] == step and "val/loss" in row
            if row["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def contact_sheet(videos: list[Tensor], gap: int = 2) -> Tensor:
    """[T, H', W', 3] uint8: columns are `videos` [B, C, T, H, W], rows their clips, separated by `gap` white pixels.

    One channel is shown as grey; of others the first three are shown (two: the third is black).
    """
    columns = []
    for video in videos:
        video = video.detach().cpu()
        channels = video.shape[1]
        if channels == 1:
            video = video.expand(-1, 3, -1, -1, -1)
        elif channels == 2:
            video = torch.cat([video, torch.zeros_like(video[:, :1])], 1)
        padded = torch.nn.functional.pad(video[:, :3], (0, gap, 0, gap), value=255)
        columns.append(torch.cat(list(padded), dim=-2))  # [3, T, B * H, W]
    return torch.cat(columns, dim=-1).permute(1, 2, 3, 0).contiguous()


class Bar:
    """The progress of a run: a live bar on a terminal, a line now and then elsewhere (a log file, a pipe).

    Refreshed at most twice a second, or every 15 seconds in a log: a live bar that redraws each step costs more CPU
    than the rest of the loop's bookkeeping together. delay_s: nothing is due before; for work that is often short.
    """

    def __init__(self, title: str, *, enabled: bool = True, delay_s: float = 0.0) -> None:
        self.title, self.enabled = title, enabled
        self.console = Console(file=sys.stdout)
        self.live = self.console.is_terminal
        self.bar: Progress | None = None
        self.every = 0.5 if self.live else 15.0
        self.last = time.monotonic() + max(delay_s - self.every, 0.0)

    def start(self) -> None:
        """Shows the live bar at once; `show` does it otherwise."""
        if self.enabled and self.live and self.bar is None:
            self.bar = Progress(
                TextColumn(f"[bold]{self.title}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self.console,
                auto_refresh=False, redirect_stdout=True, redirect_stderr=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=1.0, text="")

    def due(self) -> bool:
        return self.enabled and time.monotonic() - self.last >= self.every

    def show(self, share: float, text: str) -> None:
        if not self.enabled:
            return
        self.last = time.monotonic()
        self.start()
        if self.bar is not None:
            self.bar.update(self.task, completed=share, text=text, refresh=True)
        else:
            print(f"{self.title} {100 * share:5.1f} % | {text}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
