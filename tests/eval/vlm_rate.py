"""How fast one process asks: questions a second, and CPU time of each, with 64 in flight and 200 ms for every answer.

    python tests/eval/vlm_rate.py

64 in flight and 200 ms allow 320 a second. A benchmark and no test: what it prints is of the machine that it runs on.
"""

import time

from vlm_stub import stub_process

from eval.vlm.client import Question, Vlm, VlmConfig

QUESTIONS = 2000


def main() -> None:
    with stub_process(latency=0.2) as url:
        vlm = Vlm(VlmConfig(base_url=url, model="stub", concurrency=64))

        async def ask(number: int) -> str:
            return await vlm.ask(Question(str(number)), lambda reply: reply.text)

        vlm.run(ask, range(-64, 0))  # opens what is opened once
        started, cpu = time.perf_counter(), time.process_time()
        vlm.run(ask, range(QUESTIONS))
        rate = QUESTIONS / (time.perf_counter() - started)
        print(f"{rate:.0f} questions/s, {1000 * (time.process_time() - cpu) / QUESTIONS:.2f} ms of CPU each")


if __name__ == "__main__":
    main()
