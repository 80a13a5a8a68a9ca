# Ranks need time to save after TERM. torchrun would act on HUP even where nohup has it ignored.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=@seconds@
signals=()
[ -z "$(trap -p HUP)" ] || signals=(--signals-to-handle=SIGTERM,SIGINT,SIGQUIT)
exec @python@ -m torch.distributed.run --standalone --local-addr=127.0.0.1 "${signals[@]}" @options@
