from src.training.progress import Progress


def test_a_line_an_epoch_and_one_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(epochs=3, steps=4)
    for step, at in ((1, 1.0), (2, 9.9), (3, 10.0), (4, 12.0)):
        now[0] = at
        progress.step(step, loss=1.5)
    progress.epoch(0, 1.25, {"val/knn_top1": 12.34, "time/images_per_second": 567.8, "support/dead": 3.0})
    assert capsys.readouterr().out == (
        "epoch 1/3  step 3/4  loss 1.500\nepoch 1/3  loss 1.250  val kNN 12.3%  568 images/s\n"
    )
