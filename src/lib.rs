//! Keeps a seller's own database inside Amazon's Data Protection Policy. `ARCHITECTURE.md` is the map.

use pgrx::prelude::*;

pgrx::pg_module_magic!(name, version);

mod api;
mod domain;
mod engine;
mod pg;
mod worker;

extension_sql_file!("../sql/00_bootstrap.sql", name = "bootstrap", bootstrap);
extension_sql_file!("../sql/20_tables.sql", name = "tables", requires = ["bootstrap"]);
extension_sql_file!("../sql/30_views.sql", name = "views", requires = ["tables"]);
extension_sql_file!("../sql/40_functions.sql", name = "functions", requires = ["views"]);
extension_sql_file!(
    "../sql/90_privileges.sql",
    name = "privileges",
    requires = ["functions"],
    finalize
);

/// Settings; and, when preloaded, the launcher.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::guc::register();
    worker::launcher::register();
}
