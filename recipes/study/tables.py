def summarise(study, plan):
    return "to come"
