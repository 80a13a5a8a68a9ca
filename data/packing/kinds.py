"""Which kind of source SOURCE is: opening it by its path."""

from pathlib import Path

from data.config import shown
from data.packing.arrays import Cifar, SampleFile, cifar_files
from data.packing.names import is_image, litter
from data.packing.parquet import Parquet
from data.packing.sources import Digits, Folder, Lmdb, Source, Zip
from data.packing.tars import Tars


def open_source(text: str, *, staging: Path) -> Source:
    """The source that SOURCE of the command line names; what must be unpacked goes to `staging`.

    Raises:
        ValueError: it is of no known kind.
    """
    path = Path(text)
    if text == "digits":
        return Digits()
    if path.suffix.lower() == ".zip" and path.is_file():
        return Zip(path)
    if (path / "data.mdb").is_file():
        return Lmdb(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return SampleFile(path, staging=staging)
    if batches := cifar_files(path):
        return Cifar(batches, staging=staging)
    for suffix, kind in ((".parquet", Parquet), (".tar", Tars)):
        found, pattern = _files(path, suffix)
        if found:
            return kind(found, pattern=pattern, staging=staging)
    if path.is_dir():
        return Folder(path)
    raise ValueError(
        f"SOURCE = {shown(text)}: must be a folder, zip, tar, parquet or lmdb of images, an .npz "
        "of samples, the files of CIFAR, or `digits`"
    )


def check_alone(text: str, source: Source) -> None:
    """Raise ValueError where images or archives lie beside the files of a source in a directory."""
    root = Path(text)
    if not source.files or not root.is_dir():
        return
    known = {file.relative_to(root).as_posix() for file in source.files}
    for name in Folder(root).paths():
        if name not in known and not litter(name) and (is_image(name) or _is_archive(root / name)):
            raise ValueError(
                f"SOURCE = {text} holds {source.files[0].name} and {name}: move one of them to "
                "another directory, or give a file or a pattern of files"
            )


def _is_archive(file: Path) -> bool:
    suffix = file.suffix.lower()
    return suffix in (".tar", ".parquet") and not _is_metadata(file) and file.is_file()


def _files(path: Path, suffix: str) -> tuple[list[Path], str]:
    """The files with this suffix that `path` names, and the pattern that their names match.

    `path` is such a file, a directory of them, or a pattern such as `DIR/*train*.tar`. Parquet
    files beside a tar of the same name are left out: img2dataset writes metadata there.
    """
    if path.is_dir():
        found, pattern = (f for f in path.iterdir() if not _is_metadata(f)), "*"
    elif path.suffix.lower() != suffix:
        return [], ""
    elif path.is_file():
        return [path], path.name
    else:
        found, pattern = path.parent.glob(path.name), path.name
    wanted = (f for f in found if f.suffix.lower() == suffix and not litter(f.name))
    return sorted(f for f in wanted if f.is_file()), pattern


def _is_metadata(file: Path) -> bool:
    return file.suffix.lower() == ".parquet" and file.with_suffix(".tar").is_file()
