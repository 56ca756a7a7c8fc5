import time, multiprocessing, os, signal
from tests.train.test_resume import MANY, children
import pytest
@pytest.mark.parametrize("everyone",[False,True])
@pytest.mark.parametrize("workers",[0,1,2])
def test_x(tiny,tmp_path,everyone,workers):
    t=time.time()
    process=tiny.process(tmp_path, *MANY, "train.checkpoint_every=100", f"train.num_workers={workers}")
    metrics = tmp_path / "train" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 2):
        time.sleep(0.01)
    print("started", time.time()-t); t=time.time()
    kids=children(process.pid)
    if everyone:
        for child in kids:
            os.kill(child, signal.SIGTERM)
    process.terminate()
    while True:
        alive=[c for c in [process.pid,*kids] if os.path.exists(f"/proc/{c}")]
        print(round(time.time()-t,2), alive)
        if process.pid not in alive: break
        time.sleep(.3)
    process.join(60)
    print("END",workers,everyone, time.time()-t,process.exitcode)
