class TrainingResult(dict):
    def __init__(self, *a, model=None, data=None): super().__init__(*a); self.model=model; self.data=data
