//! The server against the file that describes it, `docs/openapi.yaml`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::super::routes::ROUTES;
use super::double::running;
use super::*;
use crate::control::{MigrationWork, Refusal, VmState, Work};

const OPENAPI: &str = include_str!("../../../../../docs/openapi.yaml");

fn document() -> Value {
    serde_saphyr::from_str(OPENAPI).unwrap()
}

/// A path of the document, and what it says of it.
struct Operation<'a> {
    document: &'a Value,
    name: String,
    method: String,
    says: &'a Value,
}

fn operations(document: &Value) -> Vec<Operation<'_>> {
    let mut operations = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, says) in methods.as_object().unwrap() {
            operations.push(Operation {
                document,
                name: path.trim_start_matches('/').into(),
                method: method.to_uppercase(),
                says,
            });
        }
    }
    operations
}

impl Operation<'_> {
    /// What goes with a request, as the document shows it.
    fn example(&self) -> String {
        match self
            .says
            .pointer("/requestBody/content/application~1json/example")
        {
            Some(example) => example.to_string(),
            None => String::new(),
        }
    }

    /// Whether the document allows this answer; says what is wrong if it does not.
    fn check(&self, (status, body): &(u16, Value)) -> Result<(), String> {
        let response = &self.says["responses"][status.to_string()];
        let response = resolved(self.document, response);
        if response.is_null() {
            return Err(format!("{}: {status} is not among the answers", self.name));
        }
        match response.pointer("/content/application~1json/schema") {
            Some(schema) => fits(self.document, schema, body)
                .map_err(|e| format!("{} {status}: {e} in {body}", self.name)),
            None if body.is_null() => Ok(()),
            None => Err(format!("{} {status}: there is a body", self.name)),
        }
    }
}

fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(reference) => document
            .pointer(reference.trim_start_matches('#'))
            .unwrap_or_else(|| panic!("{reference} leads nowhere")),
        None => value,
    }
}

/// Whether a value is what a schema says. Stricter than JSON Schema: what is not described may not be there.
fn fits(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let schema = resolved(document, schema);
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        return Err(format!("{value} is none of {allowed:?}"));
    }
    match (schema["type"].as_str().unwrap(), value) {
        ("string", Value::String(_)) | ("boolean", Value::Bool(_)) => Ok(()),
        ("integer", Value::Number(number)) => match (number.as_i64(), schema["minimum"].as_i64()) {
            (Some(number), Some(minimum)) if number < minimum => {
                Err(format!("{number} is too small"))
            }
            (Some(_), _) => Ok(()),
            (None, _) => Err(format!("{number} is no integer")),
        },
        ("array", Value::Array(items)) => items
            .iter()
            .try_for_each(|item| fits(document, &schema["items"], item)),
        ("object", Value::Object(fields)) => object_fits(document, schema, fields),
        (expected, found) => Err(format!("{found} is no {expected}")),
    }
}

fn object_fits(
    document: &Value,
    schema: &Value,
    fields: &serde_json::Map<String, Value>,
) -> Result<(), String> {
    let required = schema["required"].as_array().into_iter().flatten();
    for name in required.filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            return Err(format!("`{name}` is missing"));
        }
    }
    fields.iter().try_for_each(|(name, field)| {
        let described = match &schema["properties"][name] {
            Value::Null => &schema["additionalProperties"],
            described => described,
        };
        match described {
            Value::Null => Err(format!("`{name}` is not described")),
            described => fits(document, described, field).map_err(|e| format!("{name}: {e}")),
        }
    })
}

/// A machine of which everything can be told.
fn eventful() -> Served {
    let served = Served::running();
    let mut info = running();
    info.reason = Some("the disk is full".into());
    info.work = Some(Work {
        what: "snapshot".into(),
        pages_done: 1,
        pages_total: 2,
        bytes: 3,
        migration: Some(MigrationWork {
            round: 1,
            tag_bytes: 2,
            pages_per_second: 3,
            changes_per_second: 4,
            expected_downtime_us: 5,
            slowed: 20,
            post_copy: false,
        }),
    });
    info.config.disk = vec!["a.img,readonly,id=root".parse().unwrap()];
    info.config.net = vec!["tap0,mac=02:00:00:00:00:01,mtu=1400".parse().unwrap()];
    info.config.port = vec!["agent,socket=/run/a".parse().unwrap()];
    served.vmm.set_info(Some(info));
    served
}

/// Everything that is wrong with the answers to every path's example.
fn complaints(prepare: impl Fn(&Served)) -> Vec<String> {
    let document = document();
    let complaint = |operation: &Operation| {
        let served = eventful();
        prepare(&served);
        let answer = served.ask(&operation.method, &operation.name, &operation.example());
        operation.check(&answer).err()
    };
    operations(&document).iter().filter_map(complaint).collect()
}

#[test]
fn paths_and_methods_of_server_and_document_are_the_same() {
    let document = document();
    let described: BTreeSet<_> = operations(&document)
        .into_iter()
        .map(|operation| (operation.name, operation.method))
        .collect();
    let served: BTreeSet<_> = ROUTES
        .iter()
        .map(|route| (route.name.to_owned(), route.action.method().to_owned()))
        .collect();
    assert_eq!(described, served);
}

#[test]
fn what_is_done_is_answered_as_described() {
    assert_eq!(complaints(|_| {}), [""; 0]);
}

#[test]
fn what_is_refused_is_answered_as_described() {
    let state = Refusal::State {
        wanted: "paused",
        state: VmState::Shutdown,
    };
    assert_eq!(
        complaints(|served| served.vmm.refuse(state.clone())),
        [""; 0]
    );
    let failed = Refusal::Failed("no".into());
    assert_eq!(
        complaints(|served| served.vmm.refuse(failed.clone())),
        [""; 0]
    );
}

#[test]
fn a_migration_that_is_unsettled_is_answered_as_described() {
    let document = document();
    let operations = operations(&document);
    let sending = operations
        .iter()
        .find(|operation| operation.name == "vm.send-migration");
    let sending = sending.unwrap();
    let served = eventful();
    served
        .vmm
        .refuse(Refusal::Unsettled("3 pages of it are still here".into()));

    let answer = served.ask("PUT", &sending.name, &sending.example());

    assert_eq!(answer.0, 409);
    assert_eq!(sending.check(&answer), Ok(()));
}

#[test]
fn without_a_machine_the_answers_are_as_described() {
    assert_eq!(complaints(|served| served.vmm.set_info(None)), [""; 0]);
}

#[test]
fn a_body_that_says_nothing_is_answered_as_described() {
    let document = document();
    let complaint = |operation: &Operation| {
        let answer = eventful().ask(&operation.method, &operation.name, "[1]");
        operation.check(&answer).err()
    };
    let complaints: Vec<_> = operations(&document).iter().filter_map(complaint).collect();
    assert_eq!(complaints, [""; 0]);
}

#[test]
fn every_example_is_accepted() {
    let document = document();
    let operations = operations(&document);
    let with_body = operations
        .iter()
        .filter(|operation| !operation.example().is_empty());
    let statuses: Vec<_> = with_body
        .map(|operation| {
            eventful()
                .ask("PUT", &operation.name, &operation.example())
                .0
        })
        .collect();
    // Memory is lent over a connection that is to be upgraded, and this one is not.
    assert_eq!(statuses, [204, 204, 200, 426, 204, 204, 200, 200]);
}

#[test]
fn every_example_fits_its_own_schema() {
    let document = document();
    let complaint = |operation: &Operation| {
        let body = operation
            .says
            .pointer("/requestBody/content/application~1json")?;
        fits(&document, &body["schema"], &body["example"]).err()
    };
    let complaints: Vec<_> = operations(&document).iter().filter_map(complaint).collect();
    assert_eq!(complaints, [""; 0]);
}

#[test]
fn a_wrong_method_is_answered_with_405_everywhere() {
    let wrong: Vec<_> = ROUTES
        .iter()
        .flat_map(|route| {
            let methods = [
                "GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "HEAD", "get",
            ];
            let wrong = methods
                .into_iter()
                .filter(|method| *method != route.action.method());
            wrong.map(|method| (route.name, method))
        })
        .filter(|(name, method)| Served::running().ask(method, name, "").0 != 405)
        .collect();
    assert_eq!(wrong, []);
}

#[test]
fn the_check_of_answers_finds_what_is_wrong_with_them() {
    let document = document();
    let ping = json!({"$ref": "#/components/schemas/VmmPingResponse"});
    let good = json!({"build_version": "", "version": "", "pid": 1, "features": []});
    let with = |name: &str, value: Value| {
        let mut body = good.clone();
        body[name] = value;
        fits(&document, &ping, &body)
    };
    assert_eq!(fits(&document, &ping, &good), Ok(()));
    assert_eq!(with("pid", json!(0)), Err("pid: 0 is too small".into()));
    assert_eq!(
        with("pid", json!("1")),
        Err("pid: \"1\" is no integer".into())
    );
    assert_eq!(
        with("features", json!([1])),
        Err("features: 1 is no string".into())
    );
    assert_eq!(
        with("more", json!(1)),
        Err("`more` is not described".into())
    );
    assert_eq!(
        fits(&document, &ping, &json!({})),
        Err("`build_version` is missing".into())
    );
}
