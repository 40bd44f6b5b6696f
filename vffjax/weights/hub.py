"""Weight files from the Hugging Face Hub, by address: hf://OWNER/NAME[/FILE][@REVISION][#sha256=HEX].

huggingface_hub downloads, caches and signs in. The file's SHA-256 is compared with the one that the Hub states and, if the address holds
one, with that. Put it into the address of a run that others are to repeat.
"""

import functools
import re
from typing import Any, NamedTuple

from vffjax import file_kinds, files
from vffjax.config import HUB, WEIGHT_FILES
from vffjax.errors import bad_key, notice, said

_NAME = r"[A-Za-z0-9_][\w.-]*"
_ADDRESS = re.compile(rf"{HUB}({_NAME}/{_NAME})((?:/{_NAME})*)(?:@({_NAME}(?:/{_NAME})*))?(?:#sha256=([0-9a-fA-F]{{64}}))?", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")
# What errors of huggingface_hub mean, by their names, because they have moved between its modules. Any other error means that the Hub does
# not answer.
_REFUSED = {
    "GatedRepoError": "the owner must grant access first; ask on its page, then sign in by `hf auth login`",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "RevisionNotFoundError": "no such revision",
    "LocalEntryNotFoundError": "",  # a subclass of the next; the Hub does not answer
    "EntryNotFoundError": "no such file there",
    "HFValidationError": "no name of a repository",
}


class Address(NamedTuple):
    """A file on the Hub."""

    repository: str
    file: str
    revision: str | None
    sha256: str | None

    @classmethod
    def parsed(cls, text: str) -> "Address":
        """The address in a configuration. Raises `UserError` if it is malformed, or if its file is not a safetensors file."""
        match = _ADDRESS.fullmatch(text)
        if not match:
            raise bad_key("init_from", text, "no address", f"give {HUB}OWNER/NAME[/FILE][@REVISION][#sha256=64 hexadecimal digits]")
        repository, file, revision, sha256 = match.groups()
        file = file[1:] or f"model{WEIGHT_FILES[0]}"
        if not file.endswith(WEIGHT_FILES[0]):
            raise bad_key("init_from", text, file_kinds.not_weights(file), "name one, or download and convert it")
        return cls(repository, file, revision, sha256 and sha256.lower())


@functools.cache
def downloaded(text: str, most_bytes: int) -> str:
    """Downloads the file at an address, unless it is in huggingface_hub's cache; one line on stderr gives its SHA-256.

    Without a network connection the file in the cache is taken.

    Args:
        text: the address.
        most_bytes: the largest file that is downloaded.

    Returns:
        The path of the file in the cache.

    Raises:
        UserError: the address is malformed, the file is not there or too large, or its digest is another.
    """
    address = Address.parsed(text)
    try:
        import huggingface_hub as hub
    except ImportError:
        raise bad_key("init_from", text, "huggingface_hub is not installed", "pip install huggingface_hub, or give a file") from None
    about, silent = None, ""
    try:
        about = hub.get_hf_file_metadata(hub.hf_hub_url(address.repository, address.file, revision=address.revision))
    except Exception as error:  # of huggingface_hub or of its HTTP library, which differs between versions
        silent = f"the Hub does not answer ({said(error)})"
        if reason := _reason(error):
            raise bad_key("init_from", text, reason, "see its page on huggingface.co") from None
    if about and about.size and about.size > most_bytes:
        problem = f"{about.size} bytes, where this network and any classifier take less than {most_bytes}"
        raise bad_key("init_from", text, problem, "give weights of this network")
    revision = about.commit_hash or address.revision if about else address.revision
    try:
        path = hub.hf_hub_download(address.repository, address.file, revision=revision, local_files_only=about is None)
    except Exception as error:
        problem = _reason(error) or silent or f"the download failed ({said(error)})"
        raise bad_key("init_from", text, problem, "connect, or download it elsewhere and give the file") from None
    _compare(text, address, path, about)
    return path


def _reason(error: Exception) -> str:
    return next((_REFUSED[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _REFUSED), "")


def _compare(text: str, address: Address, path: str, about: Any) -> None:
    """Raises `UserError` if the file's SHA-256 is not the one that the Hub or the address states; else reports it on stderr."""
    digest = files.sha256_of(path)
    stated = about.etag if about and _SHA256.fullmatch(about.etag or "") else None
    for expected, whose in ((stated, "the Hub"), (address.sha256, "its address")):
        if expected and expected != digest:
            fix = "delete the file and download it again" if expected == stated else "give the digest of the file that is meant"
            raise bad_key("init_from", text, f"{path} has SHA-256 {digest}, and {whose} says {expected}", fix)
    compared = " and ".join(["the Hub"] * bool(stated) + ["its address"] * bool(address.sha256))
    commit = f" of {about.commit_hash}" if about and about.commit_hash else ""
    verdict = f"as {compared} says" if compared else "compared with nothing"
    notice(f"{text}: {address.file}{commit}, sha256 {digest}, {verdict}")
