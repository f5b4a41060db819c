"""The names in a tar: what each stands for once the last member is read, and where the links between them lead."""

import tarfile
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

LINKS_MAX = 40              # symbolic links followed for one name, as in the kernel (path_resolution(7))
NAME_MAX = 4096             # bytes in a name: <linux/limits.h> PATH_MAX, and more than a request's target may have
STEPS_MAX = 1_000_000       # components looked at to follow all links, and 50 more for each member
ALIASES_MAX = 100_000       # names that links to directories may add, where ten for each member are fewer
ALIAS_BYTES_MAX = 16 << 20  # of these names, where ten times those of the members are fewer
NOTED_LINKS_MAX = 10        # bad links reported one by one


class Stored(NamedTuple):
    """A regular file's bytes, whatever the names that lead to them."""
    offset: int
    length: int
    mtime: int


class Symlink(NamedTuple):
    target: bytes


# What a name is: a file, a link, or a word for what is not served.
Node = Stored | Symlink | str
DIRECTORY = "directory"
PLURALS = {"device": "devices", "FIFO": "FIFOs", "sparse file": "sparse files", "unknown member": "unknown members",
           "name with '..'": "names with '..'", "name with NUL": "names with NUL",
           "name that is too long": "names that are too long", "empty name": "empty names"}


class BadLink(Exception):
    """str() says what is wrong with it, to go after "the link 'name'"."""


class Tree:
    """What each name in the tar is. Names are bytes without "." and empty components; later members replace earlier."""

    def __init__(self, now: int):
        self.now = now
        self.nodes: dict[bytes, Node] = {}
        self.skipped: Counter[str] = Counter()
        self.bad_links: dict[bytes, str] = {}
        self.too_many_aliases = False
        self.steps = 0

    def add(self, member: tarfile.TarInfo) -> None:
        name = _normal(encode(member.name))
        if wrong := _wrong_name(name):
            if name or not member.isdir():      # "./" itself is a member of most tars
                self.skipped[wrong] += 1
            return
        self.bad_links.pop(name, None)
        node = self._node(name, member)
        self.nodes.pop(name, None)              # so that its place in the order is the last one's, too
        self.nodes[name] = node

    def _node(self, name: bytes, member: tarfile.TarInfo) -> Node:
        if member.isreg() and not member.issparse():
            return Stored(member.offset_data, member.size, _past(member.mtime, self.now))
        if member.isdir():
            return DIRECTORY
        if member.issym():
            return Symlink(encode(member.linkname))
        if member.islnk():
            return self._hard_link(name, encode(member.linkname))
        kind = _kind(member)
        self.skipped[kind] += 1
        return kind

    def _hard_link(self, name: bytes, target: bytes) -> Node:
        """What `target` is by now, as with link(2): later members do not change it, and a symlink stays one."""
        try:
            node = self.nodes.get(_normal(target)) or self._node_at(self._place(target.lstrip(b"/")), target)
            if isinstance(node, str):
                raise BadLink(f"leads to a {node}")
        except BadLink as bad:
            self.bad_links[name] = str(bad)
            return "bad link"
        return node

    def _place(self, path: bytes) -> bytes:
        """The name of what `path` leads to, where a link in its last part is not followed. Raises BadLink."""
        above, _, last = _normal(path).rpartition(b"/")
        if not above or last == b"..":
            return self.resolve(path)
        directory = self.resolve(above)
        return directory + b"/" + last if directory else last

    def _node_at(self, name: bytes, target: bytes) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise BadLink(f"leads to {shown(target)}, which is not there") from None

    def resolve(self, path: bytes) -> bytes:
        """The name `path` leads to when the links on its way are followed (path_resolution(7)). Raises BadLink."""
        done, pending, followed = b"", _split(path), 0
        while pending:
            self._step()
            part = pending.pop()
            if part == b"..":
                done = _parent(done)
                continue
            done = done + b"/" + part if done else part
            node = self.nodes.get(done)
            if isinstance(node, Symlink):
                followed += 1
                if followed > LINKS_MAX:
                    raise BadLink("leads in a circle, or through too many links")
                pending += _split(node.target)
                done = _parent(done)
        return done

    def _step(self) -> None:
        """One more component. Long links in a chain that many lead to would take time out of all proportion."""
        self.steps += 1
        if self.steps > STEPS_MAX + 50 * len(self.nodes):
            raise BadLink("is not followed: all links together take too many steps")

    def paths(self, prefix: bytes) -> dict[bytes, Stored]:
        """Every path that has a file, links included; in a collision the member's own name wins over a link's."""
        files: dict[bytes, Stored] = {}
        for name, node in self.nodes.items():
            if isinstance(node, Stored):
                path = _path(name, prefix)
                files.pop(path, None)
                files[path] = node
        for name, node in Linker(self).files():
            files.setdefault(_path(name, prefix), node)
        return files

    def notes(self) -> list[str]:
        """What is not served, in sentences for the operator. Directories are no loss and are not mentioned."""
        counts = [f"{count} {kind if count == 1 else PLURALS[kind]}" for kind, count in sorted(self.skipped.items())]
        links = [f"not served: the link {shown(name)} {wrong}" for name, wrong in self.bad_links.items()]
        notes = [f"not served: {', '.join(counts)}"] if counts else []
        notes += links[:NOTED_LINKS_MAX]
        if len(links) > NOTED_LINKS_MAX:
            notes.append(f"not served: {len(links) - NOTED_LINKS_MAX} more bad links")
        if self.too_many_aliases:
            notes.append("not served: some names through links to directories, for there are too many of them")
        return notes


class Linker:
    """Follows a Tree's symbolic links. A link to a directory adds a name for each file below that directory.

    Links to directories within linked directories multiply names without end, so: a directory is not entered again
    below itself, at most LINKS_MAX links lie on one path, and the names looked at are counted.
    """

    def __init__(self, tree: Tree):
        self.tree = tree
        self.links = [name for name, node in tree.nodes.items() if isinstance(node, Symlink)]
        self.sorted = sorted(tree.nodes) if self.links else []
        self.targets: dict[bytes, bytes | None] = {}
        self.left = max(ALIASES_MAX, 10 * len(tree.nodes))
        self.bytes_left = max(ALIAS_BYTES_MAX, 10 * sum(map(len, tree.nodes)))

    def files(self) -> Iterator[tuple[bytes, Stored]]:
        """(name, file) for every name that a link gives a file. Links within linked directories have to wait."""
        waiting: deque[tuple[bytes, bytes, tuple[bytes, ...]]] = deque((link, link, ()) for link in self.links)
        while waiting:
            alias, link, inside = waiting.popleft()
            target = self._target(link)
            if target is None:
                continue
            node = self.tree.nodes.get(target)
            if isinstance(node, Stored):
                yield alias, node
            elif self._may_enter(link, target, inside):
                for name, below in self._below(target, alias):
                    if isinstance(below, Stored):
                        yield name, below
                    elif isinstance(below, Symlink):
                        waiting.append((name, target + name[len(alias):], (*inside, target)))

    def _may_enter(self, link: bytes, target: bytes, inside: tuple[bytes, ...]) -> bool:
        """Whether to go into the directory `target` once more; `inside` are those on the way to `link`."""
        circle = target in inside or len(inside) == LINKS_MAX
        if circle:
            self.tree.bad_links.setdefault(link, "leads in a circle and is not followed below itself")
        return not circle

    def _target(self, link: bytes) -> bytes | None:
        """What `link` leads to in the end, a file or a directory; None for a bad one, which is noted."""
        if link not in self.targets:
            try:
                self.targets[link] = self._good_target(link)
            except BadLink as bad:
                self.tree.bad_links[link] = str(bad)
                self.targets[link] = None
        return self.targets[link]

    def _good_target(self, link: bytes) -> bytes:
        target = self.tree.resolve(link)
        if not target or link.startswith(target + b"/"):
            raise BadLink("leads to a directory that it is in itself")
        if self._range(target):
            return target
        node = self.tree._node_at(target, _target_of(self.tree.nodes[link]))
        if isinstance(node, str) and node != DIRECTORY:
            raise BadLink(f"leads to a {node}")
        return target

    def _range(self, directory: bytes) -> range:
        """Where in the sorted names those below `directory` are; "0" is the byte after "/"."""
        return range(bisect_left(self.sorted, directory + b"/"), bisect_left(self.sorted, directory + b"0"))

    def _below(self, directory: bytes, alias: bytes) -> Iterator[tuple[bytes, Node]]:
        """(name under `alias`, node) for what is below `directory`, until too much has been looked at."""
        for place in self._range(directory):
            if not self.left or self.bytes_left < 0:
                self.tree.too_many_aliases = True
                return
            self.left -= 1
            name = self.sorted[place]
            if len(alias) + len(name) - len(directory) <= NAME_MAX:
                self.bytes_left -= len(alias) + len(name) - len(directory)
                yield alias + name[len(directory):], self.tree.nodes[name]


def _target_of(node: Node) -> bytes:
    return node.target if isinstance(node, Symlink) else b""


def encode(name: str) -> bytes:
    """The bytes a name has in the tar: it was decoded the same way."""
    return name.encode("utf-8", "surrogateescape")


def _normal(name: bytes) -> bytes:
    return b"/".join([part for part in name.split(b"/") if part not in (b"", b".")])


def normal_prefix(prefix: str) -> bytes:
    """Written like the names it is taken off; whether it ends in a slash makes a difference."""
    name = _normal(encode(prefix))
    return name + b"/" if name and prefix.endswith("/") else name


def _wrong_name(name: bytes) -> str:
    """Why a member of this (normal) name is not served, "" if it is."""
    if not name:
        return "empty name"
    if len(name) > NAME_MAX:
        return "name that is too long"
    if b"\0" in name:                           # only pax can have it, and no request can
        return "name with NUL"
    return "name with '..'" if b".." in name and b".." in name.split(b"/") else ""


def _kind(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "sparse file"
    if member.ischr() or member.isblk():
        return "device"
    return "FIFO" if member.isfifo() else "unknown member"


def _past(mtime: float, now: int) -> int:
    """Clamped to [0, now]; pax allows fractions, negative numbers, and tarfile "nan" and "inf"."""
    if mtime >= now:
        return now
    return int(mtime) if mtime > 0 else 0


def _split(path: bytes) -> list[bytes]:
    """The components of a link's path, last one first. Raises BadLink."""
    if path.startswith(b"/"):
        raise BadLink(f"leads out of the archive, to {shown(path)}")
    if not path or len(path) > NAME_MAX:
        raise BadLink("is empty" if not path else "is too long")
    return _normal(path).split(b"/")[::-1] if _normal(path) else []


def _parent(name: bytes) -> bytes:
    if not name:
        raise BadLink("leads out of the archive")
    return name.rpartition(b"/")[0]


def _path(name: bytes, prefix: bytes) -> bytes:
    """Where a name is served. The prefix is one of the text, not of whole components."""
    return b"/" + (_normal(name.removeprefix(prefix)) or name)


def shown(name: bytes) -> str:
    """For messages: in quotes, control characters escaped, not endlessly long."""
    shown = repr(name.decode("utf-8", "backslashreplace"))
    return shown if len(shown) <= 200 else shown[:200] + "..."
