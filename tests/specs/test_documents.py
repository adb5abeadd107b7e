"""YAML documents: what loads, and where each mistake is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs.desired import EnvSpec, HostSpec, Ready, VmSpec
from specs.documents import Document, SpecErrors, dump, load, load_all, read_source

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBvXp0aHVzdGVyZXhhbXBsZWtleWZvcnRlc3RzMDA you@laptop"
OTHER = "ssh-rsa AAAAB3NzaC1yc2E= ci"


def errors_of(text: str, base: Path | None = None) -> list[str]:
    """The mistakes of a text, each as `line:column: field: message`."""
    with pytest.raises(SpecErrors) as caught:
        load(text, "f", base)
    return [str(error).removeprefix("f:") for error in caught.value.errors]


def env(**fields: object) -> EnvSpec:
    return EnvSpec.model_validate({"id": "a", "ssh_keys": [], "vms": [{"image": "tiny"}], **fields})


def test_a_text_holds_environments_and_hosts_in_order() -> None:
    text = f"id: web\nssh_keys: [{KEY}]\nvms:\n  - image: tiny\n---\nkind: Host\naddr: 10.0.0.2:9100\n---\n"
    assert load(text, "f.yaml", None) == (
        Document(EnvSpec(id="web", ssh_keys=(KEY,), vms=(VmSpec(image="tiny"),)), "f.yaml", 1),
        Document(HostSpec(addr="10.0.0.2:9100"), "f.yaml", 6),
    )


def test_plain_words_are_text_as_yaml_1_2_reads_them() -> None:
    text = "%YAML 1.1\n---\nid: no\nowner: 2024-01-01\nssh_keys: []\nvms: [{image: on, host_labels: {zone: 22:22, x: y}}]"
    (document,) = load(text, "f", None)
    assert document.spec == env(id="no", owner="2024-01-01", vms=[{"image": "on", "host_labels": {"zone": "22:22", "x": "y"}}])


def test_numbers_may_be_written_in_octal_and_hexadecimal() -> None:
    (document,) = load("id: a\nssh_keys: []\nvms: [{image: t, cpu: 0o10, mem: 0x400, disk: +0512}]", "f", None)
    assert document.spec == env(vms=[{"image": "t", "cpu": 8, "mem": 1024, "disk": 512}])


def test_an_entry_takes_the_fields_of_another_and_its_own_win() -> None:
    text = "id: a\nssh_keys: []\nvms:\n  - &b {image: t, cpu: 1, mem: 64}\n  - {cpu: 4, <<: *b}\n  - <<: [{disk: 9}, *b]\n"
    (document,) = load(text, "f", None)
    base = {"image": "t", "cpu": 1, "mem": 64}
    assert document.spec == env(vms=[base, {**base, "cpu": 4}, {**base, "disk": 9}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "id: a\nvms:\n  - image: t\n    engine: docker\n    ready: {ssh_baner: 22}\n",
            "5:13: vms.0.ready.ssh_baner: is not a known field; did you mean 'ssh-banner'?",
        ),
        (
            "id: a\nvms:\n  - image: t\n    engine: docker\n    ready: {timeout: 9s}\n",
            "5:5: vms.0.ready: needs exactly one of tcp, ssh-banner and http",
        ),
        (
            "id: a\nvms:\n  - image: t\n    engine: docker\n    port: [80]\n",
            "5:5: vms.0.port: is not a known field; did you mean 'ports'?",
        ),
        ("id: a\nvms:\n  - engine: docker\n", "3:5: vms.0.image: is required"),
        ("vms: [{image: t, engine: docker}]\n", "1:1: id: is required"),
        ("id: a\n", "1:1: vms: is required"),
        ("id: a\nvms: []\n", "2:1: vms: must have at least one entry"),
        ("id: a\nvms: tiny\n", "2:1: vms: must be a list, an entry a line, each after '- '"),
        ("id: a\nvms:\n- tiny\n", "3:3: vms.0: must be a set of fields, such as `image: tiny`"),
        ("id: a\nvms: [{image: t, engine: docker}]\nram: 3\n", "3:1: ram: is not a known field; a VM has 'mem', under vms"),
        ("id: a\nvms: [{image: t, engine: docker}]\nttl: 3\n", "3:1: ttl: is not a known field; did you mean 'lifetime'?"),
        ("id: a\nvms: [{image: t, engine: docker}]\ncpu: 3\n", "3:1: cpu: belongs to a VM, under vms"),
        ("id: a\nvms: [{image: t, engine: docker, owner: x}]\n", "2:34: vms.0.owner: belongs to the environment, not to a VM"),
        ("id: a\nvms: [{image: t, engine: docker, zzz: x}]\n", "2:34: vms.0.zzz: is not a known field"),
        ("id: a\nvms: [{image: t, engine: docker, cpu: 0}]\n", "2:34: vms.0.cpu: must be greater than 0, not '0'"),
        ("id: a\nvms: [{image: t, engine: docker, cpu: 1.5}]\n", "2:34: vms.0.cpu: must be a whole number, not '1.5'"),
        ("id: a\nvms: [{image: t, engine: docker, cpu: '2'}]\n", "2:34: vms.0.cpu: must be a whole number, not '2'"),
        ("id: a\nvms: [{image: t, engine: docker, cpu: yes}]\n", "2:34: vms.0.cpu: must be a whole number, not 'yes'"),
        (
            "id: a\nvms: [{image: t, engine: docker, ports: [80, 70000]}]\n",
            "2:46: vms.0.ports.1: must be less than or equal to 65535, not '70000'",
        ),
        ("id: a\nvms: [{image: t, engine: docker, ports: [80, 80]}]\n", "2:34: vms.0.ports: lists 80 more than once"),
        (
            "id: a\nvms: [{image: t, engine: docker, ports: 80}]\n",
            "2:34: vms.0.ports: must be a list, an entry a line, each after '- '",
        ),
        (
            "id: a\nvms: [{image: t, engine: docker, deny_outgoing: no}]\n",
            "2:34: vms.0.deny_outgoing: must be true or false, not 'no'",
        ),
        (
            "id: a\nvms: [{image: t, engine: dokcer}]\n",
            "2:18: vms.0.engine: must be qemu, firecracker, docker, bhyve or jail, not 'dokcer'; did you mean 'docker'?",
        ),
        (
            "id: a\nvms: [{image: t, engine: docker, restart: on_failure}]\n",
            "2:34: vms.0.restart: must be always, on-failure or never, not 'on_failure'; did you mean 'on-failure'?",
        ),
        (
            "id: a\nvms: [{image: t, engine: docker, host_labels: {disk: true}}]\n",
            '2:48: vms.0.host_labels.disk: must be text; write it in quotes: "true"',
        ),
        ("id: 7\nvms: [{image: t, engine: docker}]\n", '1:1: id: must be text; write it in quotes: "7"'),
        ("id:\nvms: [{image: t, engine: docker}]\n", "1:1: id: must be text"),
        (
            "id: ..\nvms: [{image: t, engine: docker}]\n",
            "1:1: id: must be 1-128 of A-Z a-z 0-9 . _ - and must not start with '.' or contain '..'",
        ),
        (
            "id: a\nssh_keys: []\nvms:\n- image: t\n- image: ../t\n",
            "5:3: vms.1.image: must be 1-128 of A-Z a-z 0-9 . _ - and must not start with '.' or contain '..'",
        ),
        ("id: a\nvms: [{image: t}]\n", "1:1: ssh_keys: is required because a qemu VM can only be entered with a key"),
        (
            "id: a\nssh_keys: [hello]\nvms: [{image: t}]\n",
            "2:12: ssh_keys.0: must be an OpenSSH public key: 'ssh-ed25519 AAAA… comment'",
        ),
        (
            f'id: a\nssh_keys: ["{KEY}\\n{KEY}"]\nvms: [{{image: t}}]\n',
            "2:12: ssh_keys.0: must be one line without control characters",
        ),
        (
            "id: a\nlifetime: 1h30m\nvms: [{image: t, engine: docker}]\n",
            '2:1: lifetime: must be seconds, a duration such as "90m" or "2d", or "never"',
        ),
        (
            "id: a\nvms:\n- {image: t, engine: docker, name: x}\n- {image: t, engine: docker, name: x}\n",
            "2:1: vms: names x more than once",
        ),
        ("id: a\nid: b\nvms: [{image: t, engine: docker}]\n", "2:1: id: is given twice; the first is in line 1"),
        (
            "id: a\nvms:\n- {image: t, engine: docker, cpu: 1, cpu: 1}\n",
            "3:38: vms.0.cpu: is given twice; the first is in line 3",
        ),
        ("kind: Enviroment\nid: a\n", "1:1: kind: must be Environment or Host; did you mean 'Environment'?"),
        ("kind: [Host]\naddr: a:1\n", "1:1: kind: must be Environment or Host"),
        ("kind: Host\n", "1:1: addr: is required"),
        ("kind: Host\naddr: 10.0.0.2\n", "2:1: addr: must be host:port, such as 10.0.0.2:9100"),
        ("kind: Host\naddr: a:1\nadress: b:1\n", "3:1: adress: is not a known field; did you mean 'addr'?"),
        ("- id: a\n", "1:1: a document is a set of fields, such as `id: hello`"),
        ("hello\n", "1:1: a document is a set of fields, such as `id: hello`"),
        ("", "1:1: holds no document"),
        ("# nothing\n---\n---\n", "1:1: holds no document"),
    ],
)
def test_a_mistake_is_reported_at_its_line_and_column(text: str, expected: str) -> None:
    assert errors_of(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id: a\n\tvms: []\n", "2:1: a tab cannot indent YAML; use spaces"),
        ("id: a\n  x: 3\n", "2:4: a ':' is not expected here; check the indentation, or put the text in quotes"),
        ("id: 'a\n", "2:1: id: the closing quote is missing (begun in line 1)"),
        ("id: a\nssh_keys:\n  - @key.pub\n", "3:5: ssh_keys.0: text that starts with '@' must be in quotes"),
        ("id: a\nvms: [1,\n  2\nx: 3\n", "4:2: vms.2: expected ',' or ']', but got ':' (begun in line 2)"),
        ("a: 1\n b: 2\n- c\n", "2:3: a ':' is not expected here; check the indentation, or put the text in quotes"),
        ("vms:\n    - a\n  - b\n", "3:3: does not line up with the lines before it (begun in line 1)"),
        ("id: a\x00b\n", "1:6: the character U+0000 is not allowed in YAML"),
        ("id: a\n\n x: \x1b[31m\n", "3:5: the character U+001B is not allowed in YAML"),
        ('id: "\\ud800"\nvms: [{image: t, engine: docker}]\n', "1:5: id: holds an escape that stands for no character"),
        ("id: !python/object:os.system a\n", "1:5: id: the tag !python/object:os.system is not supported; write plain values"),
        ("id: *x\n", "1:5: id: *x refers to no &x before it"),
        ("vms: &x [*x]\n", "1:10: vms.0: *x refers to itself"),
        ("{a: b}: 1\n", "1:1: a field's name must be plain text; put text with braces or brackets in quotes"),
        ("[" * 5000, "1:24: " + "0." * 23 + "0: is nested more than 24 levels deep"),
        ("id: " + "x" * 1024 * 1024, "1:1: is larger than 1024 KiB"),
        (
            "vms: \n" + "- 1\n" * 100_100,
            "99999:3: vms.99997: asks for more than 100000 values in one text (aliases written out)",
        ),
    ],
)
def test_what_is_not_yaml_for_us_is_refused_with_its_place(text: str, expected: str) -> None:
    assert expected in errors_of(text)


def test_a_bomb_of_aliases_is_refused_before_it_unfolds() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert errors_of("\n".join(lines))[0] == ("5:45: a4.7: asks for more than 100000 values in one text (aliases written out)")


def test_a_long_chain_of_aliases_is_refused_before_it_nests_too_deep() -> None:
    chain = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]
    assert errors_of("\n".join(chain))[0] == "24:12: a23.0: is nested more than 24 levels deep"


def test_a_long_text_repeated_by_aliases_is_refused_too() -> None:
    text = f"key: &k '{'x' * 500_000}'\nssh_keys: [{', '.join(['*k'] * 1000)}]\n"
    assert errors_of(text)[0].endswith("asks for more than 100000 values in one text (aliases written out)")


def test_all_mistakes_of_all_documents_are_reported_at_once_in_the_order_of_their_lines() -> None:
    text = """\
id: hello
ssh_keys: [oops]
vms:
  - image: ../tiny
    cpu: 0
    port: [80]
  - image: tiny
    ports: [80, 80]
    name: .x
---
kind: Host
addr: nowhere
---
id: second
lifetime: soon
vms: [{}]
---
id: third
  vms: []
"""
    assert errors_of(text) == [
        "2:12: ssh_keys.0: must be an OpenSSH public key: 'ssh-ed25519 AAAA… comment'",
        "4:5: vms.0.image: must be 1-128 of A-Z a-z 0-9 . _ - and must not start with '.' or contain '..'",
        "5:5: vms.0.cpu: must be greater than 0, not '0'",
        "6:5: vms.0.port: is not a known field; did you mean 'ports'?",
        "8:5: vms.1.ports: lists 80 more than once",
        "9:5: vms.1.name: must be 1-128 of A-Z a-z 0-9 . _ - and must not start with '.' or contain '..'",
        "12:1: addr: must be host:port, such as 10.0.0.2:9100",
        "14:1: ssh_keys: is required because a qemu VM can only be entered with a key",
        '15:1: lifetime: must be seconds, a duration such as "90m" or "2d", or "never"',
        "16:7: vms.0.image: is required",
        "19:6: a ':' is not expected here; check the indentation, or put the text in quotes",
    ]


def test_the_same_name_in_two_texts_is_reported_with_both_places() -> None:
    text = "id: a\nvms: [{image: t, engine: docker}]\n"
    with pytest.raises(SpecErrors) as caught:
        load_all([(text, "one.yaml", None), ("---\n" + text, "two.yaml", None)])
    assert str(caught.value) == "two.yaml:2:1: id: env/a is already defined at one.yaml:1"


def test_control_characters_of_a_text_never_reach_the_terminal() -> None:
    assert errors_of('"id\\e[31m\\n": x\nid: a\nvms: [{image: t, engine: docker}]\n') == [
        "1:1: id\\x1b[31m\\n: is not a known field"
    ]


def test_a_key_file_gives_all_its_keys_beside_those_written_out(tmp_path: Path) -> None:
    (tmp_path / "keys.pub").write_text(f"# ours\n\n{KEY}\n  {OTHER}  \n")
    text = "id: a\nssh_keys: ['@keys.pub', ssh-rsa AAAA]\nvms: [{image: t, ssh_keys: ['@./keys.pub']}]\n"
    (document,) = load(text, "f", tmp_path)
    assert document.spec == env(ssh_keys=[KEY, OTHER, "ssh-rsa AAAA"], vms=[{"image": "t", "ssh_keys": [KEY, OTHER]}])


def test_a_key_file_of_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key.pub").write_text(KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    (document,) = load("id: a\nssh_keys: ['@~/key.pub']\nvms: [{image: t}]\n", "f", Path("/nowhere"))
    assert document.spec == env(ssh_keys=[KEY], vms=[{"image": "t"}])


def test_each_unusable_key_file_is_reported_at_its_entry_without_its_content(tmp_path: Path) -> None:
    (tmp_path / "two").write_text(f"{KEY}\n{OTHER}\n")
    (tmp_path / "bad").write_text("# fine\nsecret stuff\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "private").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    (tmp_path / "huge").write_bytes(b"\n" * 300_000)
    text = "id: a\nvms:\n- image: t\n  ssh_keys:\n" + "".join(
        f'  - "{entry}"\n'
        for entry in ("@two", "@none", "@bad", "@empty", "@private", "@huge", "@.", "@", "@\\0", "@~nobody-here/x", "x")
    )
    public_key = "must be an OpenSSH public key: 'ssh-ed25519 AAAA… comment'"
    assert errors_of(text, tmp_path) == [
        f"6:5: vms.0.ssh_keys.1: {tmp_path}/none does not exist; make a key with: ssh-keygen -t ed25519",
        f"7:5: vms.0.ssh_keys.2: {tmp_path}/bad line 2 {public_key}",
        f"8:5: vms.0.ssh_keys.3: {tmp_path}/empty holds no key",
        f"9:5: vms.0.ssh_keys.4: {tmp_path}/private is a private key; name the public one, which ends in .pub",
        f"10:5: vms.0.ssh_keys.5: {tmp_path}/huge is larger than 256 KiB; is it a file of public keys?",
        f"11:5: vms.0.ssh_keys.6: {tmp_path} is not a plain file",
        "12:5: vms.0.ssh_keys.7: names no file after the @",
        "13:5: vms.0.ssh_keys.8: embedded null byte",
        "14:5: vms.0.ssh_keys.9: ~nobody-here/x cannot be read: Could not determine home directory.",
        f"15:5: vms.0.ssh_keys.10: {public_key}",
    ]


def test_a_text_from_elsewhere_cannot_read_files_here(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(KEY)
    assert errors_of(f"id: a\nssh_keys:\n- '@{tmp_path}/key.pub'\nvms: [{{image: t}}]\n", None) == [
        "3:3: ssh_keys.0: @files are read by the muster command only; paste the public key itself"
    ]


def test_unreadable_files_are_mistakes_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"id: a\nowner: \xe9\n")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (1024 * 1024 + 1))
    told = []
    for name in ("latin1.yaml", "missing.yaml", "."):
        with pytest.raises(SpecErrors) as caught:
            read_source(tmp_path / name)
        told.append(str(caught.value).removeprefix(f"{tmp_path}"))
    assert told == [
        "/latin1.yaml:2:1: is not UTF-8 text",
        "/missing.yaml:1:1: cannot be read: No such file or directory",
        ":1:1: cannot be read: Is a directory",
    ]
    assert errors_of(read_source(tmp_path / "huge.yaml")) == ["1:1: is larger than 1024 KiB"]


def test_a_dumped_environment_reads_well() -> None:
    written = env(
        id="web",
        owner="no",
        lifetime="never",
        ssh_keys=[KEY],
        vms=[
            {"image": "r:5000/a/b:1.2", "engine": "podman", "name": "x", "ports": [80]},
            {"image": "tiny", "user_data": "#!/bin/sh\n  hi\n"},
        ],
    )
    assert dump(written) == (
        f'id: web\nowner: "no"\nlifetime: never\nssh_keys:\n  - "{KEY}"\nvms:\n  - name: x\n    image: "r:5000/a/b:1.2"\n'
        "    engine: docker\n    ports:\n      - 80\n  - image: tiny\n    user_data: |\n      #!/bin/sh\n        hi\n"
    )


names = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(lambda name: ".." not in name)
labels = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30)
machines = st.builds(
    VmSpec,
    image=names,
    engine=st.sampled_from(["qemu", "firecracker", "jail"]),
    cpu=st.integers(1, 2**32 - 1),
    mem=st.integers(1, 9999),
    disk=st.just(40960) | st.integers(1, 9999),
    ports=st.sets(st.integers(1, 65535), max_size=3).map(tuple),
    deny_outgoing=st.booleans(),
    ssh_keys=st.just((KEY,)) | st.just(()),
    count=st.integers(1, 3),
    restart=st.sampled_from(["always", "on-failure", "never"]),
    spread=st.sampled_from(["pack", "hosts"]),
    host_labels=st.dictionaries(names, labels, max_size=2),
    ready=st.none() | st.builds(Ready, ssh_banner=st.integers(1, 65535), timeout=st.integers(1, 100)),
    user_data=st.text(st.characters(exclude_categories=("Cs",)), max_size=60) | st.text("a #:-\n\t\r'\"\\|>", max_size=20),
)
environments = st.builds(
    EnvSpec,
    id=names,
    owner=labels,
    ssh_keys=st.sampled_from([(), (KEY,), (KEY, OTHER)]),
    vms=st.lists(machines, min_size=1, max_size=3),
    lifetime=st.just("never") | st.integers(0, 10**6),
    on_host_loss=st.sampled_from(["wait", "recreate"]),
)


@given(environments)
def test_a_dumped_environment_loads_as_the_same_environment(written: EnvSpec) -> None:
    (document,) = load(dump(written), "f", None)
    assert document.spec == written


@given(st.text(max_size=80) | st.text("id: vms-[]{}&*!|>'\"\n\t #@a1~", max_size=60))
def test_any_text_loads_or_gives_places_within_it(text: str) -> None:
    try:
        documents = load(text, "f", None)
    except SpecErrors as caught:
        lines = text.count("\n") + sum(text.count(c) for c in "\r\x85\u2028\u2029") + 1
        assert caught.errors
        assert all(1 <= error.line <= lines and error.column >= 1 for error in caught.errors)
    else:
        assert documents
