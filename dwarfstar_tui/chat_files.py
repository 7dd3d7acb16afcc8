"""Where conversations are kept: one file each, whole or not at all, CHATS_MAX of them. Blocks: for threads."""

from __future__ import annotations

import re
from pathlib import Path

from dwarfstar_engine.wire.private_files import replace_file
from dwarfstar_tui.conversation import CHATS_MAX
from dwarfstar_tui.updates import ChatsRead

MAX_BYTES = 8 << 20
CHAT_ID = re.compile(r"[a-z0-9-]{1,40}")


class ChatFiles:
    """Files of a folder. What cannot be read is told of and left alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> ChatsRead:
        """Newest first."""
        texts, problems = [], []
        for path in self._newest()[:CHATS_MAX]:
            try:
                if path.stat().st_size > MAX_BYTES:
                    problems.append(f"{path} is too large for a conversation")
                    continue
                texts.append(path.read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{path} cannot be read: {error}")
        return ChatsRead(tuple(texts), tuple(problems))

    def keep(self, chat_id: str, text: str) -> None:
        """Write one, or delete it if there is no text. Raises TrustError."""
        assert CHAT_ID.fullmatch(chat_id), chat_id
        path = self._folder / f"{chat_id}.json"
        if not text:
            path.unlink(missing_ok=True)
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, text.encode())
        for old in self._newest()[CHATS_MAX:]:
            old.unlink(missing_ok=True)

    def _newest(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        files = [(path.stat().st_mtime, path) for path in self._folder.glob("*.json")]
        return [path for _, path in sorted(files, reverse=True)]
