//! What can be asked for: Cloud Hypervisor's paths and ours, each with what is done.
//!
//! A request ends with a status, and unless all is well with the reasons: a JSON array of text, from what was asked for
//! to why it was not done.

use super::body::{Invalid, read};
use super::config::VmConfig;
use super::debug::{GdbConfig, GdbReport};
use super::http::{Request, Response, Status};
use super::migration::{DecideMigrationConfig, ReceiveMigrationConfig, SendMigrationConfig};
use super::model::{InspectConfig, PingResponse, RestoreConfig, SnapshotConfig, VmInfo};
use crate::control::{Refusal, Vmm};
use crate::inspection::{Lease, PROTOCOL};

const ROOT: &str = "/api/v1/";

/// What became of a request.
pub struct Outcome {
    pub response: Response,
    /// The VMM is to end after this.
    pub ends: bool,
    /// What the connection is for from here on.
    pub lease: Option<Lease>,
}

/// A path, and what a request for it does.
pub struct Route {
    /// The path's last part.
    pub name: &'static str,
    /// What to say if it is not done.
    failure: &'static str,
    pub action: Action,
}

/// What a request for a path does.
#[derive(Clone, Copy)]
pub enum Action {
    /// `GET`: tells something.
    Tell(fn(&dyn Vmm) -> Result<Response, Failure>),
    /// `PUT` without a body.
    Do(fn(&dyn Vmm) -> Result<(), Refusal>),
    /// `PUT` with a body.
    DoWith(fn(&dyn Vmm, &[u8]) -> Result<Response, Failure>),
    /// `PUT` with a body, after which the connection is no longer HTTP's.
    Lend(fn(&dyn Vmm, &[u8]) -> Result<Lease, Failure>),
    /// `PUT`: there is no such thing in Tagvisor, for this reason.
    Lack(&'static str),
    /// `PUT`: the VMM ends.
    End,
}

impl Action {
    pub const fn method(self) -> &'static str {
        match self {
            Self::Tell(_) => "GET",
            _ => "PUT",
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug)]
pub enum Failure {
    /// What was sent says nothing that could be done.
    Body(String),
    /// The VMM refused.
    Refused(Refusal),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Invalid> for Failure {
    fn from(invalid: Invalid) -> Self {
        Self::Body(invalid.to_string())
    }
}

const fn route(name: &'static str, failure: &'static str, action: Action) -> Route {
    Route {
        name,
        failure,
        action,
    }
}

const NO_HOTPLUG: &str =
    "Tagvisor's machines keep the devices that they were created with: name them in vm.create";
const NO_RESIZE: &str = "Tagvisor's machines keep the size that they were created with";

/// Every path.
pub const ROUTES: &[Route] = {
    use Action::{Do, DoWith, End, Lack, Lend, Tell};
    &[
        route("vmm.ping", "The VMM could not be reached", Tell(ping)),
        route("vmm.shutdown", "The VMM could not shutdown", End),
        route("vm.info", "The VM info is not available", Tell(info)),
        route(
            "vm.counters",
            "The VM counters are not available",
            Tell(counters),
        ),
        route("vm.create", "The VM could not be created", DoWith(create)),
        route("vm.boot", "The VM could not boot", Do(|vmm| vmm.boot())),
        route(
            "vm.pause",
            "The VM could not be paused",
            Do(|vmm| vmm.pause()),
        ),
        route(
            "vm.resume",
            "The VM could not resume",
            Do(|vmm| vmm.resume()),
        ),
        route(
            "vm.shutdown",
            "The VM could not shutdown",
            Do(|vmm| vmm.shutdown()),
        ),
        route(
            "vm.reboot",
            "The VM could not reboot",
            Do(|vmm| vmm.reboot()),
        ),
        route("vm.delete", "The VM could not be deleted", Do(delete)),
        route(
            "vm.snapshot",
            "The VM could not be snapshotted",
            DoWith(snapshot),
        ),
        route(
            "vm.restore",
            "The VM could not be restored",
            DoWith(restore),
        ),
        route(
            "vm.power-button",
            "Error triggering power button",
            Lack(
                "Tagvisor's machines have no power button: shut the guest down from within, or use vm.shutdown",
            ),
        ),
        route(
            "vm.nmi",
            "Error triggering NMI",
            Lack("Tagvisor's machines have no NMI"),
        ),
        route("vm.resize", "The VM could not be resized", Lack(NO_RESIZE)),
        route(
            "vm.resize-disk",
            "The disk could not be resized",
            Lack(NO_RESIZE),
        ),
        route(
            "vm.resize-zone",
            "The memory zone could not be resized",
            Lack(NO_RESIZE),
        ),
        route(
            "vm.add-device",
            "The device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-user-device",
            "The user device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-disk",
            "The disk could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-fs",
            "The fs could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-generic-vhost-user",
            "The generic vhost-user device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-pmem",
            "The pmem device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-net",
            "The network device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-vdpa",
            "The vDPA device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.add-vsock",
            "The vsock device could not be added to the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.remove-device",
            "The device could not be removed from the VM",
            Lack(NO_HOTPLUG),
        ),
        route(
            "vm.receive-migration",
            "Error receiving migration",
            DoWith(receive_migration),
        ),
        route(
            "vm.send-migration",
            "Error sending migration",
            DoWith(send_migration),
        ),
        route(
            "vm.cancel-migration",
            "The migration could not be cancelled",
            Do(|vmm| vmm.cancel_migration()),
        ),
        route(
            "vm.decide-migration",
            "It could not be decided where the VM runs",
            DoWith(decide_migration),
        ),
        route("vm.inspect", "The VM could not be inspected", Lend(inspect)),
        route(
            "vm.gdb",
            "The VM could not be opened to debuggers",
            DoWith(debug),
        ),
        route(
            "vm.coredump",
            "The VM could not be coredumped",
            Lack(
                "Tagvisor's cores are written by `tagvisor core`, with the memory that vm.inspect lends",
            ),
        ),
    ]
};

/// Carries a request out.
pub fn dispatch(vmm: &dyn Vmm, request: &Request) -> Outcome {
    let name = request.path.strip_prefix(ROOT).unwrap_or_default();
    let Some(route) = ROUTES.iter().find(|route| route.name == name) else {
        return stays(Response::error(Status::NotFound, &["Not Found"]));
    };
    let method = route.action.method();
    if request.method != method {
        let why = format!("{name} is asked for with {method}");
        return stays(Response {
            allow: Some(method),
            ..Response::error(Status::MethodNotAllowed, &["Method Not Allowed", &why])
        });
    }
    if let Action::End = route.action {
        return Outcome {
            response: Response::NO_CONTENT,
            ends: true,
            lease: None,
        };
    }
    if let Action::Lend(lend) = route.action {
        return lent(route, lend, vmm, request);
    }
    let answer = perform(route.action, vmm, &request.body);
    stays(answer.unwrap_or_else(|failure| failure.response(route)))
}

fn stays(response: Response) -> Outcome {
    Outcome {
        response,
        ends: false,
        lease: None,
    }
}

/// Whoever does not ask for the protocol would not know what to do with it, while the guest stands still.
fn lent(
    route: &Route,
    lend: fn(&dyn Vmm, &[u8]) -> Result<Lease, Failure>,
    vmm: &dyn Vmm,
    request: &Request,
) -> Outcome {
    if !request.upgrades {
        let why = format!("it needs a connection that is upgraded to {PROTOCOL}");
        return stays(Response::error(
            Status::UpgradeRequired,
            &[route.failure, &why],
        ));
    }
    match lend(vmm, &request.body) {
        Ok(lease) => Outcome {
            response: Response::SWITCHING_PROTOCOLS,
            ends: false,
            lease: Some(lease),
        },
        Err(failure) => stays(failure.response(route)),
    }
}

fn perform(action: Action, vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    match action {
        Action::Tell(tell) => tell(vmm),
        Action::Do(_) if !body.is_empty() => Err(Failure::Body("there is to be no body".into())),
        Action::Do(act) => {
            act(vmm)?;
            Ok(Response::NO_CONTENT)
        }
        Action::DoWith(act) => act(vmm, body),
        Action::Lend(_) | Action::End => Ok(Response::NO_CONTENT),
        Action::Lack(why) => {
            vmm.info()?;
            Err(Refusal::Unsupported(why.into()).into())
        }
    }
}

impl Failure {
    fn response(&self, route: &Route) -> Response {
        match self {
            Self::Body(why) => Response::error(Status::BadRequest, &[route.failure, why]),
            Self::Refused(refusal) => {
                let status = match refusal {
                    Refusal::NoVm => Status::NotFound,
                    Refusal::State { .. } => Status::MethodNotAllowed,
                    Refusal::Unsettled(_) => Status::Conflict,
                    Refusal::VmExists
                    | Refusal::Debugged(_)
                    | Refusal::Unsupported(_)
                    | Refusal::Failed(_) => Status::InternalServerError,
                };
                let allow = (status == Status::MethodNotAllowed).then(|| route.action.method());
                Response {
                    allow,
                    ..Response::error(status, &[route.failure, &refusal.to_string()])
                }
            }
        }
    }
}

fn ping(_: &dyn Vmm) -> Result<Response, Failure> {
    Ok(Response::ok(&PingResponse::of_this_process()))
}

fn info(vmm: &dyn Vmm) -> Result<Response, Failure> {
    Ok(Response::ok(&VmInfo::from(vmm.info()?)))
}

/// There are none.
fn counters(vmm: &dyn Vmm) -> Result<Response, Failure> {
    vmm.info()?;
    Ok(Response::ok(&serde_json::Map::new()))
}

fn create(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    vmm.create(read::<VmConfig>(body)?.machine()?)?;
    Ok(Response::NO_CONTENT)
}

/// Where there is none there is nothing to do, which Cloud Hypervisor takes for success.
fn delete(vmm: &dyn Vmm) -> Result<(), Refusal> {
    match vmm.delete() {
        Err(Refusal::NoVm) => Ok(()),
        result => result,
    }
}

fn snapshot(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    let config: SnapshotConfig = read(body)?;
    let wants_report = config.report;
    let report = vmm.snapshot(config.request()?)?;
    Ok(if wants_report {
        Response::ok(&report)
    } else {
        Response::NO_CONTENT
    })
}

fn restore(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    vmm.restore(read::<RestoreConfig>(body)?.request()?)?;
    Ok(Response::NO_CONTENT)
}

fn inspect(vmm: &dyn Vmm, body: &[u8]) -> Result<Lease, Failure> {
    Ok(vmm.inspect(read::<InspectConfig>(body)?.request()?)?)
}

fn send_migration(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    let config: SendMigrationConfig = read(body)?;
    let wants_report = config.report;
    let report = vmm.migrate(config.request()?)?;
    Ok(if wants_report {
        Response::ok(&report)
    } else {
        Response::NO_CONTENT
    })
}

fn receive_migration(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    vmm.receive(read::<ReceiveMigrationConfig>(body)?.request()?)?;
    Ok(Response::NO_CONTENT)
}

fn decide_migration(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    vmm.decide_migration(read::<DecideMigrationConfig>(body)?.run)?;
    Ok(Response::NO_CONTENT)
}

fn debug(vmm: &dyn Vmm, body: &[u8]) -> Result<Response, Failure> {
    let at = vmm.debug(read::<GdbConfig>(body)?.request()?)?;
    Ok(Response::ok(&GdbReport::from(at)))
}
