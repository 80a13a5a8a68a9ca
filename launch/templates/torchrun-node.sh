  node)
    # A rebooted machine must be able to rejoin, and ranks need time to save after TERM.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=@seconds@
    # Machines may call themselves otherwise than `hosts` does.
    first=0
    [ "$2" != @first@ ] || first=1
    meeting=(--local-addr="$2" --rdzv-conf="join_timeout=600,last_call_timeout=5,is_host=$first")
    exec @python@ -m torch.distributed.run "${meeting[@]}"@options@ ;;
