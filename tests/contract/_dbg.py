from tests.contract.test_distributed import *
def go():
    out=[]
    for use_orig, nested in product((False,True),repeat=2):
        wrap = partial(FullyShardedDataParallel, use_orig_params=use_orig, device_id=torch.device("cpu"))
        model = Branches(); optimizer = penalised(model)
        if nested:
            for name in NAMES: setattr(model, name, wrap(getattr(model, name)))
        w = wrap(model)
        for s in range(2):
            backward(w, share(batch(s)))
            optimizer.step()
        ps=[p for g in optimizer.param_groups for p in g["params"]]
        out.append((use_orig,nested,optimizer.balance.norms.tolist(),optimizer.balance.step,optimizer.coefficients(),[tuple(p.shape) for p in ps],[hasattr(p,"_fsdp_flattened") for p in ps],[p.grad is not None for p in ps], [type(m).__name__ for m in model.children()], len(list(w.parameters()))))
    return out
