"""What the peers that run in PyTorch share."""

import time

from peers import Missing


def need(*modules):
    """Imports them; Missing names the first that is not there."""
    import importlib
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as e:   # a broken extension is as good as none
            raise Missing(f"the Python module {name} could not be imported ({type(e).__name__}: "
                          f"{str(e).splitlines()[0] if str(e) else ''})") from None


def torch_device(options):
    import torch
    if options["device"] == "cpu":
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Missing("PyTorch sees no CUDA device")
    return torch.device("cuda")


def synchronize(device):
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device, call):
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def warm_up(device, call, seconds=1.0):
    """Calls it once, which may compile, and then as long as krait bench does before it times: a GPU at its limit of
    power is faster at first."""
    timed(device, call)
    left = seconds
    while left > 0:
        left -= timed(device, call)


def release(device):
    """Gives memory back to the device, so that the next system has all of it."""
    import gc

    import torch
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class TorchPeer:
    """A peer that runs in PyTorch: a subclass has model(shape's name), and decode, prefill and generate,
    which take a model and a test and return seconds."""

    def __init__(self, options):
        self.options = options
        self.device = torch_device(options)

    def measure(self, tests):
        import torch
        try:
            model = self.model(tests[0]["shape"])
        except Exception as e:
            for i in range(len(tests)):
                yield i, {"error": one_line(e)}
            return
        with torch.inference_mode():
            for i, t in enumerate(tests):
                try:
                    yield i, {"seconds": getattr(self, t["kind"])(model, t)}
                except Exception as e:
                    yield i, {"error": one_line(e)}
                self.forget(model)
                release(self.device)
        del model
        release(self.device)

    def forget(self, model):
        """Drops what a model keeps from one test to the next."""

    def ids(self, batch, n):
        import torch
        return torch.randint(1, 50000, (batch, n), device=self.device)
