  node)
    # A rebooted machine must be able to rejoin, and ranks need time to save after TERM.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=@seconds@
    exec @command@ ;;
