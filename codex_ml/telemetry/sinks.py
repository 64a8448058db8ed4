from contextlib import contextmanager
class S:
    errors={}
    def log(self,*a,**k): pass
    def flush(self): pass
@contextmanager
def open_sinks(c,f,r): yield S()
