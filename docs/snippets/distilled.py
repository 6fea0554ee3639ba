def stage():
    model, optimizer = make()
    weights = gradloc.load_run("runs/demo").weights("last")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def train_step(annealer):
        batch = torch.arange(64) + 64 * (annealer.steps_taken % 23)  # the same one wherever the stage goes on
        logits = model(x[batch])
        loss = nn.functional.cross_entropy(logits, y[batch])
        if annealer.distill:
            loss = loss + annealer.distillation(logits, x[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    @torch.no_grad()
    def validate():
        return float(nn.functional.cross_entropy(model(x[1500:]), y[1500:]))

    return model, optimizer, train_step, validate, {"scheduler": scheduler}
