"""What an extension has made in a database, in words: to be compared with what another way of making it leaves."""
MEMBERS = """
WITH e AS (SELECT oid FROM pg_extension WHERE extname = 'amazon_pii'),
     r AS (SELECT c.* FROM pg_class AS c WHERE c.relnamespace = 'amazon_pii'::regnamespace AND c.relkind <> 'i'),
     f AS (SELECT p.* FROM pg_proc AS p WHERE p.pronamespace = 'amazon_pii'::regnamespace)
"""
# Rights as they are in effect, whether they were ever written down or not.
RIGHTS = """ARRAY(SELECT COALESCE(g.rolname, 'PUBLIC') || ' ' || a.privilege_type || CASE WHEN a.is_grantable THEN ' with grant option' ELSE '' END
    FROM aclexplode(COALESCE({acl}, acldefault('{kind}', {owner}))) AS a LEFT JOIN pg_roles AS g ON g.oid = a.grantee ORDER BY 1)::text"""


def rights(alias, prefix, kind):
    return RIGHTS.format(acl=f"{alias}.{prefix}acl", kind=kind, owner=f"{alias}.{prefix}owner")


# Each row: what it is about, and words about it. The order of columns is left out: those that an update adds come last.
QUERIES = {
    "extension": "SELECT 'amazon_pii', concat_ws('; ', extversion, extrelocatable, extnamespace::regnamespace) FROM pg_extension WHERE extname = 'amazon_pii'",
    "member": "SELECT pg_describe_object(d.classid, d.objid, d.objsubid), '' FROM e JOIN pg_depend AS d ON d.refobjid = e.oid "
              "AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'",
    "dumped": "SELECT c.rel::regclass::text, COALESCE(c.condition, '') FROM e JOIN pg_extension AS x USING (oid) "
              "CROSS JOIN LATERAL ROWS FROM (unnest(x.extconfig), unnest(x.extcondition)) AS c (rel, condition)",
    "schema": "SELECT n.nspname, concat_ws('; ', n.nspowner::regrole, obj_description(n.oid, 'pg_namespace'), " + rights("n", "nsp", "n") + ") "
              "FROM pg_namespace AS n WHERE n.nspname = 'amazon_pii'",
    "relation": "SELECT r.relname, concat_ws('; ', r.relkind, r.relpersistence, r.reloptions, r.relowner::regrole, r.relrowsecurity, r.relreplident, "
                "obj_description(r.oid, 'pg_class'), CASE WHEN r.relkind = 'S' THEN " + rights("r", "rel", "s") + " ELSE " + rights("r", "rel", "r") + " END) FROM r",
    "column": "SELECT r.relname || '.' || a.attname, concat_ws('; ', format_type(a.atttypid, a.atttypmod), "
              "CASE WHEN a.attnotnull THEN 'NOT NULL' END, 'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), NULLIF(a.attidentity, ''), "
              "NULLIF(a.attgenerated, ''), a.attcollation::regcollation, a.attstorage, a.attacl, col_description(r.oid, a.attnum)) "
              "FROM r JOIN pg_attribute AS a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped "
              "LEFT JOIN pg_attrdef AS d ON d.adrelid = r.oid AND d.adnum = a.attnum WHERE r.relkind <> 'S'",
    "constraint": "SELECT r.relname || '.' || k.conname, concat_ws('; ', pg_get_constraintdef(k.oid), k.convalidated) "
                  "FROM r JOIN pg_constraint AS k ON k.conrelid = r.oid WHERE k.contype <> 'n'",
    "index": "SELECT i.indexrelid::regclass::text, concat_ws('; ', pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisclustered) "
             "FROM r JOIN pg_index AS i ON i.indrelid = r.oid",
    "trigger": "SELECT r.relname || '.' || t.tgname, concat_ws('; ', pg_get_triggerdef(t.oid), t.tgenabled) "
               "FROM r JOIN pg_trigger AS t ON t.tgrelid = r.oid WHERE NOT t.tgisinternal",
    "view": "SELECT r.relname, pg_get_viewdef(r.oid) FROM r WHERE r.relkind = 'v'",
    "sequence": "SELECT r.relname, concat_ws('; ', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle, "
                "(SELECT d.refobjid::regclass || '.' || d.refobjsubid FROM pg_depend AS d WHERE d.objid = r.oid AND d.deptype IN ('i', 'a') "
                "AND d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass)) FROM r JOIN pg_sequence AS s ON s.seqrelid = r.oid",
    "function": "SELECT f.oid::regprocedure::text, concat_ws('; ', pg_get_functiondef(f.oid), f.proowner::regrole, "
                "obj_description(f.oid, 'pg_proc'), " + rights("f", "pro", "f") + ") FROM f",
    "type": "SELECT t.typname, t.typtype::text FROM pg_type AS t WHERE t.typnamespace = 'amazon_pii'::regnamespace AND t.typelem = 0",
    "event trigger": "SELECT t.evtname, concat_ws('; ', t.evtevent, t.evtenabled, t.evttags, t.evtfoid::regproc, t.evtowner::regrole, "
                     "obj_description(t.oid, 'pg_event_trigger')) FROM pg_event_trigger AS t",
}


def catalog(db):
    """{what and which: words}."""
    found = {}
    for kind, query in QUERIES.items():
        for name, words in db.sql(f"{MEMBERS} {query}"):
            found[f"{kind} {name}"] = words
    return found


def differences(is_, should):
    """The objects in which two catalogs differ, one line each, with the words where they part."""
    lines = []
    for name in sorted(is_.keys() | should.keys()):
        one, other = is_.get(name), should.get(name)
        if one is None or other is None:
            lines.append(f"{name}: {'missing' if one is None else 'too many'}")
        elif one != other:
            at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
            lines.append(f"{name}: is …{one[max(at - 30, 0):at + 80]!r}, should be …{other[max(at - 30, 0):at + 80]!r}")
    return "\n".join(lines)
