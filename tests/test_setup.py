from lib.runs import torch_build


def report(*needed):
    return {"install": [{"metadata": {"requires_dist": ["filelock", *needed]}}]}


def test_a_build_with_cuda_is_known_by_what_it_needs_on_this_system(monkeypatch):
    monkeypatch.setattr(torch_build.sys, "platform", "linux")
    assert torch_build.brings_cuda(report('nvidia-cublas==13.0; platform_system == "Linux"'))
    assert not torch_build.brings_cuda(report('nvidia-cublas==13.0; platform_system == "Windows"'))
    assert not torch_build.brings_cuda(report('nvidia-something; extra == "gpu"'))
    assert not torch_build.brings_cuda(report())


def test_advice_is_given_only_where_build_and_machine_do_not_go_together():
    assert torch_build.advice(gpu=True, cuda=True, torch="torch==1") == ""
    assert torch_build.advice(gpu=False, cuda=False, torch="torch==1") == ""
    assert "pip install torch==1 --index-url" in torch_build.advice(gpu=False, cuda=True, torch="torch==1")
    assert "whl/cpu`" in torch_build.advice(gpu=False, cuda=True, torch="torch==1")
    assert "whl/cpu`" not in torch_build.advice(gpu=True, cuda=False, torch="torch==1")


def test_the_pinned_torch_is_found(monkeypatch, capsys):
    asked = []
    answer = '{"install": [{"metadata": {"requires_dist": ["nvidia-cublas==13.0"]}}]}'
    monkeypatch.setattr(
        torch_build.subprocess,
        "run",
        lambda command, **_: asked.append(command) or type("Done", (), {"stdout": answer}),
    )
    monkeypatch.setattr(torch_build, "has_gpu", lambda: False)
    torch_build.main()
    assert asked[0][-1].startswith("torch==") and "no GPU" in capsys.readouterr().out
