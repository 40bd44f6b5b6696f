"""Weights by address: a stand-in for huggingface_hub downloads, or fails in every way that it can."""

import hashlib
import inspect
import sys
import types

import pytest

from image_sets import fails as refused
from oracles import config_of, random_states
from vffjax.training.plan import make_plan
from vffjax.weights import hub, weights
from vffjax.weights.hub import Address

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64
MOST = 10**6


class Hub:
    """Records what is asked of it; `fails` names an error of its own, by function."""

    def __init__(self, folder):
        self.folder, self.asked, self.fails = folder, [], {}
        self.etag, self.size, self.commit = DIGEST, len(CONTENT), "c0ffee"
        self.module = types.ModuleType("huggingface_hub")
        for function in (self.hf_hub_url, self.get_hf_file_metadata, self.hf_hub_download):
            setattr(self.module, function.__name__, function)
        self.path = folder / "model.safetensors"
        self.path.write_bytes(CONTENT)

    def _maybe_fail(self, function):
        kinds = self.fails.get(function, ())
        if kinds:  # from the general to the special
            kind = Exception
            for name in kinds:
                kind = type(name, (kind,), {})
            raise kind("401 of https://huggingface.co\nand\x1b[2J more")

    def hf_hub_url(self, repo_id, filename, *, revision=None):
        self._maybe_fail("url")
        return f"{repo_id}/{filename}@{revision}"

    def get_hf_file_metadata(self, url):
        self._maybe_fail("metadata")
        self.asked.append(url)
        return types.SimpleNamespace(etag=self.etag, size=self.size, commit_hash=self.commit)

    def hf_hub_download(self, repo_id, filename, *, revision=None, local_files_only=False):
        self._maybe_fail("download")
        self.asked.append((repo_id, filename, revision, local_files_only))
        return str(self.path)


@pytest.fixture
def there(tmp_path, monkeypatch):
    hub.downloaded.cache_clear()
    made = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made.module)
    yield made
    hub.downloaded.cache_clear()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://timm/resnet18.a1_in1k", Address("timm/resnet18.a1_in1k", "model.safetensors", None, None)),
        ("hf://a/b/c.safetensors", Address("a/b", "c.safetensors", None, None)),
        ("hf://a/b/d/c.safetensors@v1.0", Address("a/b", "d/c.safetensors", "v1.0", None)),
        ("hf://a/b@refs/pr/1", Address("a/b", "model.safetensors", "refs/pr/1", None)),
        (f"hf://a/b@main#sha256={DIGEST.upper()}", Address("a/b", "model.safetensors", "main", DIGEST)),
        (f"hf://a/b#sha256={DIGEST}", Address("a/b", "model.safetensors", None, DIGEST)),
    ],
)
def test_an_address_names_repository_file_revision_and_digest(text, address):
    assert Address.parsed(text) == address


MALFORMED = [
    "hf://",
    "hf://a",
    "hf://a/",
    "hf:///b",
    "hf://a/b/",
    "hf://a/b@",
    "hf://a/b#sha256=12",
    f"hf://a/b#md5={DIGEST}",
    "hf://a b/c",
]
MALFORMED += [
    "hf://a/../b.safetensors",
    "hf://a/b/../../c.safetensors",
    "hf://../b",
    "hf://a/b@../c",
    "hf://a/b//c.safetensors",
    "hf://ä/b",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_address_is_refused(text, there):
    refused(lambda: hub.downloaded(text, MOST), f"config.init_from={text!r}: no address; give hf://OWNER/NAME[/FILE][@REVISION]")
    assert there.asked == []


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "model.safetensors.index.json"])
def test_only_safetensors_are_taken_from_the_hub(file, there):
    refused(lambda: hub.downloaded(f"hf://a/b/{file}", MOST), "config.init_from=", "not a .safetensors file")
    assert there.asked == []


def test_a_file_is_downloaded_once_compared_and_said_on_one_line(there, capsys):
    text = f"hf://timm/resnet18.a1_in1k@main#sha256={DIGEST}"
    assert hub.downloaded(text, MOST) == hub.downloaded(text, MOST) == str(there.path)
    # The commit that was asked about is the one that is downloaded.
    assert there.asked == ["timm/resnet18.a1_in1k/model.safetensors@main", ("timm/resnet18.a1_in1k", "model.safetensors", "c0ffee", False)]
    assert capsys.readouterr().err == f"{text}: model.safetensors of c0ffee, sha256 {DIGEST}, as the Hub and its address says\n"


def test_a_small_file_has_no_digest_on_the_hub(there, capsys):
    there.etag = "0123456789abcdef0123456789abcdef01234567"  # git's
    hub.downloaded("hf://a/b", MOST)
    assert capsys.readouterr().err.endswith(f"sha256 {DIGEST}, compared with nothing\n")


def test_another_digest_is_refused(there):
    message = refused(lambda: hub.downloaded(f"hf://a/b#sha256={OTHER}", MOST), f"has SHA-256 {DIGEST}", f"its address says {OTHER}")
    assert str(there.path) in message
    there.etag = OTHER
    refused(lambda: hub.downloaded("hf://a/b", MOST), f"the Hub says {OTHER}", "download it again")


def test_a_file_larger_than_the_network_can_be_is_not_downloaded(there):
    there.size = MOST + 1
    refused(lambda: hub.downloaded("hf://a/b", MOST), f"{MOST + 1} bytes, where this network and any classifier take less than {MOST}")
    assert len(there.asked) == 1


NO_NETWORK = [("OSError", "ConnectionError"), ("HfHubHTTPError",), ("OfflineModeIsEnabled",)]


@pytest.mark.parametrize("kinds", NO_NETWORK, ids=str)
def test_without_a_network_the_cache_serves(kinds, there, capsys):
    there.fails["metadata"] = kinds
    assert hub.downloaded(f"hf://a/b@v1#sha256={DIGEST}", MOST) == str(there.path)
    assert there.asked == [("a/b", "model.safetensors", "v1", True)]
    assert "as its address says" in capsys.readouterr().err
    hub.downloaded.cache_clear()
    there.fails["download"] = ("EntryNotFoundError", "LocalEntryNotFoundError")
    message = refused(
        lambda: hub.downloaded("hf://a/b", MOST), "config.init_from='hf://a/b': the Hub does not answer", kinds[-1], "give the file"
    )
    assert message.isprintable()


ANSWERS = {
    ("HfHubHTTPError", "RepositoryNotFoundError"): "no such repository, or a private one",
    ("HfHubHTTPError", "RepositoryNotFoundError", "GatedRepoError"): "the owner must grant access first",
    ("HfHubHTTPError", "RevisionNotFoundError"): "no such revision",
    ("EntryNotFoundError", "RemoteEntryNotFoundError"): "no such file there",
}


@pytest.mark.parametrize(("kinds", "says"), ANSWERS.items(), ids=str)
def test_what_the_hub_refuses_is_one_line(kinds, says, there):
    there.fails["metadata"] = kinds
    refused(lambda: hub.downloaded("hf://a/b", MOST), f"config.init_from='hf://a/b': {says}", "huggingface.co")
    assert there.asked == []


def test_what_the_package_says_of_a_name_and_of_a_failed_download_is_one_line(there):
    there.fails = {"url": ("ValueError", "HFValidationError")}
    refused(lambda: hub.downloaded("hf://a/b..c", MOST), "config.init_from='hf://a/b..c': no name of a repository")
    there.fails = {"download": ("ReadTimeout",)}
    refused(lambda: hub.downloaded("hf://a/b", MOST), "the download failed (ReadTimeout: 401", "download it elsewhere")


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: hub.downloaded("hf://a/b", MOST), "config.init_from='hf://a/b': huggingface_hub is not installed; pip install")


def test_the_package_takes_what_is_asked_of_the_stand_in():
    real = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[hub]'")
    for name in ("hf_hub_url", "get_hf_file_metadata", "hf_hub_download"):
        wanted = [p for p in inspect.signature(getattr(Hub, name)).parameters if p != "self"]
        assert set(wanted) <= set(inspect.signature(getattr(real, name)).parameters)


def test_a_run_starts_from_an_address(there):
    config = config_of(dataset="digits", network="mlp", widths=(4, 3), init_from="hf://somebody/digits")
    plan = make_plan(config, 12, 10)
    weights.write_weights(there.path, plan, random_states(plan, (8, 8, 1)), {})
    there.etag, there.size = hashlib.sha256(there.path.read_bytes()).hexdigest(), there.path.stat().st_size
    weights.check_start(config)
    assert weights.local_file(config) == str(there.path)
    assert len(there.asked) == 2  # not downloaded again
    assert weights.local_file(config_of(init_from="w.safetensors")) == "w.safetensors"
    there.path.write_bytes(b"other")
    hub.downloaded.cache_clear()
    refused(lambda: weights.check_start(config), "the Hub says")
