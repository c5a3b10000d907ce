"""Forked and spawned processes, threads, event loops of other kinds: each a small program as users write it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAD = """
import asyncio, multiprocessing, os, sys, threading
import numpy as np
import hunyuan3d_client as h

URL = sys.argv[1]
LATENTS, CONTEXT = np.ones((1, 3, 64), np.float32), np.ones((1, 5, 1536), np.float16)


def child(work):
    # The exit code of a forked child that does `work`; it is killed if it hangs.
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(10)
    if process.is_alive():
        process.kill()
        return "hangs"
    return process.exitcode


def refused(call, words):
    try:
        call()
    except h.InvalidInput as error:
        assert words in str(error) and "hint: " in str(error), error
    else:
        raise AssertionError("not refused")
"""
PROGRAMS = {
    "fork before the first call": """
client = h.Client(URL)  # at the top of a module that gunicorn preloads
def work():
    assert client.denoise(LATENTS, 0.5, CONTEXT).shape == (1, 3, 64)
    client.close()
assert [child(work), child(work)] == [0, 0]
assert client.denoise(LATENTS, 0.5, CONTEXT).shape == (1, 3, 64)
client.close()
""",
    "fork after a call": """
client = h.Client(URL)
client.health()
open_stream = client.stream(CONTEXT, steps=3)
next(open_stream)
def work():
    refused(client.health, "forked child")
    refused(lambda: next(open_stream), "forked child")
    refused(lambda: h.Client(URL).health(), "before the fork")
    refused(lambda: h.Client([URL, URL]).health(timeout_s=5), "before the fork")
    client.close()
assert child(work) == 0
assert [step.index for step in open_stream] == [2, 3]
assert client.denoise(LATENTS, 0.5, CONTEXT).shape == (1, 3, 64)
client.close()
""",
    "fork of an asyncio program": """
async def main():
    async with h.AsyncClient(URL) as client:
        await client.health()
        def work():
            async def inside():
                await client.health()
            refused(lambda: asyncio.new_event_loop().run_until_complete(inside()), "forked child")
        pid = os.fork()
        if not pid:
            try:
                asyncio.set_event_loop(None), asyncio._set_running_loop(None)
                work()
            except BaseException as error:
                print(error)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        await client.health()
asyncio.run(main())
""",
    "spawn": """
def work(url):
    with h.Client(url) as client:
        client.health()
if __name__ == "__main__":
    with h.Client(URL) as client:
        client.health()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(URL,))
        process.start()
        process.join(60)
        assert process.exitcode == 0, process.exitcode
""",
    "threads": """
client, found = h.Client(URL), []
def work(index):
    for _ in range(5):
        velocity = client.denoise(np.full((1, 2, 64), float(index)), 1, CONTEXT)
        found.append((velocity == index).all())
threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(found) == 40 and all(found)
client.close()
""",
    "a running loop, as in Jupyter": """
loop = asyncio.new_event_loop()  # a kernel runs its cells in one loop that never ends
threading.Thread(target=loop.run_forever, daemon=True).start()
def cell(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)
later = h.AsyncClient(URL)
async def first():
    with h.Client(URL) as client:  # the blocking client inside the running loop
        client.health()
        with client.stream(CONTEXT, steps=2) as steps:
            assert [step.index for step in steps] == [1, 2]
    return await later.denoise(LATENTS, 0.5, CONTEXT)
async def second():
    async with later, later.stream(CONTEXT, steps=2) as steps:
        return [step.index async for step in steps]
assert cell(first()).shape == (1, 3, 64) and cell(second()) == [1, 2]
""",
    "a second asyncio.run": """
client = h.AsyncClient(URL)
async def main():
    await client.denoise(LATENTS, 0.5, CONTEXT)
asyncio.run(main())
refused(lambda: asyncio.run(main()), "event loop of its first call")
async def leave():
    async with client:
        pass
asyncio.run(leave())
""",
    "uvloop": """
import uvloop
async def main():
    async with h.AsyncClient(URL) as client, client.stream(CONTEXT, steps=2) as steps:
        assert [step.index async for step in steps] == [1, 2]
        found = await asyncio.gather(*(client.denoise(LATENTS, t, CONTEXT) for t in (0, 0.5, 1)))
        assert [velocity.max() for velocity in found] == [0, 0.5, 1]
    with h.Client(URL) as client:
        client.health()
uvloop.run(main())
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program(name: str, kserve: Any, tmp_path: Path) -> None:
    if name == "uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("needs uvloop")
    script = tmp_path / "program.py"
    script.write_text(HEAD + PROGRAMS[name] + '\nif __name__ == "__main__":\n    print("ok")\n')
    done = subprocess.run([sys.executable, "-X", "dev", str(script), kserve.url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr, done.stderr
