"""Demand paging: which guest pages are present, and what happens when an absent one is touched.

`Pager` decides, a trap (`kvmdp.trap`) makes absent pages trap, a source delivers bytes.
"""
