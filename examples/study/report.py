def write_results(shop, tuned, cells, out):
    from cells import summary_of

    for c in cells:
        s = summary_of(shop, c)
        print(
            c.task,
            c.split,
            c.method,
            c.seed,
            s
            and (
                s.get("trained"),
                s.get("final_accuracy"),
                s.get("best_accuracy"),
                s.get("final_eval_loss"),
                s.get("error"),
            ),
        )
