from contextlib import contextmanager
class D:
    def step(self,*a): pass
    def epoch(self,e,m): print(e,m)
    def note(self,t): print(t)
@contextmanager
def open_display(mode, epochs): yield D()
