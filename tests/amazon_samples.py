"""Reads Amazon's sample payloads into the schema of fixtures/spapi.sql, and says which of their values are a buyer's.

The rules here follow the table in the samples' README and are written a second time on purpose: a test that took them
from the policy would find whatever the policy finds."""
import csv
import json
import re
from itertools import count

PLACEHOLDER = "[Redacted]"
LONG_AGO = "2020-01-01T00:00:00Z"

# Places of a buyer's values, as dotted paths without the positions in lists.
BUYERS = re.compile(
    r"(?:^|\.)(?:"
    # Orders v0
    r"Buyer(?:Email|Name|County|CompanyName)|PurchaseOrderNumber|Buyer(?:TaxInfo|TaxInformation)\..+|ShippingAddress\..+"
    r"|DeliveryPreferences\.(?:DropOffLocation|AddressInstructions)"
    r"|GiftMessageText|BuyerCustomizedInfo\.CustomizedURL|BuyerRequestedCancel\.BuyerCancelReason"
    r"|RegulatedInformation\.Fields\.FieldValue|PaymentExecutionDetail\.(?:AcquirerId|AuthorizationCode|CardBrand)"
    r"|packageDetail\.trackingNumber|prescriptionDetail\.(?:prescriptionId|usageInstructions|clinicId)"
    # Orders 2026-01-01
    r"|buyer\.(?:buyerName|buyerEmail|buyerCompanyName|buyerPurchaseOrderNumber)|recipient\.deliveryAddress\..+"
    r"|recipient\.deliveryPreference\.(?:dropOffLocation|addressInstruction)|packing\.giftOption\.giftMessage"
    r"|product\.customization\.customizedUrl|cancellation\.cancellationRequest\.cancelReason"
    r"|paymentExecutions\.(?:acquirerId|authorizationCode|cardBrand)|packages\.trackingNumber"
    r")$"
)
TAX = re.compile(r"(?:^|\.)taxRegistrations\.(?:legalName|taxRegistrationNumber|taxRegistrationAddress\..+|taxRegistrationAttributes\..+)$")


class Number(str):
    """A number by its digits, so that 1.10 and 1.1 differ."""


class Object(list):
    """Members in their order."""


def parse(text):
    return json.loads(text, object_pairs_hook=Object, parse_int=Number, parse_float=Number)


def leaves(document, path="", entity=None):
    """Every value that is no container: (path, value, whether it is a buyer's)."""
    if isinstance(document, Object):
        entity = dict(document).get("entityType", entity)
        for key, value in document:
            yield from leaves(value, f"{path}.{key}" if path else key, entity)
    elif isinstance(document, list):
        for value in document:
            yield from leaves(value, path, entity)
    else:
        yield path, document, bool(BUYERS.search(path) or (TAX.search(path) and entity == "BUYER"))


def redacted(document, path="", entity=None):
    """The document as it must be once its buyer's values are gone and nothing else is."""
    if isinstance(document, Object):
        entity = dict(document).get("entityType", entity)
        return Object((k, redacted(v, f"{path}.{k}" if path else k, entity)) for k, v in document)
    if isinstance(document, list):
        return [redacted(v, path, entity) for v in document]
    ((_, value, buyers),) = leaves(document, path, entity)
    if not buyers or value in (None, ""):
        return value
    return PLACEHOLDER if type(value) is str else None


# Import


def at(document, *path):
    """The value at a path of keys, or None."""
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def orders_of(document):
    """The parts of a sample that are about one order each: (order number, part)."""
    body = at(document, "response") or document
    payload = at(body, "payload") or {}
    asked = at(document, "request", "parameters", "orderId", "value")
    many = at(payload, "Orders") or at(body, "orders")
    if many is not None:
        return [(o.get("AmazonOrderId") or o["orderId"], o) for o in many]
    if at(body, "order"):
        return [(body["order"]["orderId"], body["order"])]
    # getOrderItemsBuyerInfo's example names its order in OrderItemId.
    number = at(payload, "AmazonOrderId") or at(payload, "OrderItemId") or asked
    return [(number, payload or at(document, "request", "parameters", "body", "value"))]


class Importer:
    def __init__(self, db):
        self.db = db
        self.keys = {}

    def write(self, table, **values):
        values = {k: v for k, v in values.items() if v is not None}
        names = ", ".join(f'"{name}"' for name in values)
        marks = ", ".join("%s" for _ in values)
        statement = f"INSERT INTO spapi.{table} ({names}) VALUES ({marks}) RETURNING *"
        return self.db.sql(statement, list(values.values()), user="shop_owner")[0][0]

    def order(self, number):
        if number not in self.keys:
            self.keys[number] = self.write("orders", amazon_order_id=number, dispatched_at=LONG_AGO)
        return self.keys[number]

    def set(self, number, **values):
        for column, value in values.items():
            if value is not None:
                statement = f'UPDATE spapi.orders SET "{column}" = %s WHERE id = %s'
                self.db.sql(statement, [value, self.order(number)], user="shop_owner")

    def sample(self, name, text):
        """One JSON sample: as received, and taken apart."""
        document = json.loads(text)
        parts = orders_of(document)
        answer = self.write("answers", source=name, raw=text, raw_json=text, raw_text=text)
        new = "2026" in name
        for number, part in parts:
            order = self.order(number)
            self.write("answer_orders", answer_id=answer, order_id=order)
            own = json.dumps(part, indent=3, ensure_ascii=False)
            self.write(
                "payloads_2026" if new else "payloads_v0", order_id=order, source=name, raw=own, raw_json=own, raw_text=own
            )
            (self.order_2026 if new else self.order_v0)(number, part)

    def address(self, number, kind, a, extended):
        if a:
            lower = {k.lower(): v for k, v in a.items()}
            lines = [lower.get(f"addressline{n}") for n in (1, 2, 3)] + [v for v in (extended or {}).values() if isinstance(v, str)]
            place = at(extended, "GeoCoordinates") or {}
            self.write(
                "addresses", order_id=self.order(number), kind=kind, name=lower.get("name"), company=lower.get("companyname"),
                lines=lines, city=lower.get("city"), district=lower.get("districtorcounty") or lower.get("county"),
                state=lower.get("stateorregion"), zip=lower.get("postalcode"), country=lower.get("countrycode"),
                phone=lower.get("phone"), latitude=place.get("Latitude"), longitude=place.get("Longitude"),
            )

    def order_v0(self, number, o):
        buyer = at(o, "BuyerInfo") or o
        self.set(
            number, status=at(o, "OrderStatus"), total=at(o, "OrderTotal", "Amount"), currency=at(o, "OrderTotal", "CurrencyCode"),
            buyer_name=at(buyer, "BuyerName"), buyer_email=at(buyer, "BuyerEmail"), buyer_county=at(buyer, "BuyerCounty"),
            buyer_company=at(buyer, "BuyerTaxInfo", "CompanyLegalName"), purchase_order=at(buyer, "PurchaseOrderNumber"),
            drop_off=at(o, "DeliveryPreferences", "DropOffLocation"),
            instructions=at(o, "DeliveryPreferences", "AddressInstructions"), raw=json.dumps(o),
        )
        shipping = at(o, "ShippingAddress")
        self.address(number, "recipient", shipping, at(shipping, "ExtendedFields"))
        self.address(number, "ship_from", at(o, "DefaultShipFromLocationAddress"), None)
        for item in at(o, "OrderItems") or []:
            info = item.get("BuyerInfo") or item
            self.write(
                "items", order_id=self.order(number), item_id=item["OrderItemId"], title=item.get("Title"),
                price=at(item, "ItemPrice", "Amount"), gift_message=info.get("GiftMessageText"),
                customized_url=at(info, "BuyerCustomizedInfo", "CustomizedURL"),
                cancel_reason=at(item, "BuyerRequestedCancel", "BuyerCancelReason"),
            )
        for payment in at(o, "PaymentExecutionDetail") or []:
            self.write(
                "payments", order_id=self.order(number), amount=at(payment, "Payment", "Amount"), acquirer=payment.get("AcquirerId"),
                authorization_code=payment.get("AuthorizationCode"), card_brand=payment.get("CardBrand"),
            )
        for field in at(o, "RegulatedInformation", "Fields") or []:
            self.write(
                "regulated_fields", order_id=self.order(number), field_id=field["FieldId"], label=field["FieldLabel"],
                type=field["FieldType"], value=field["FieldValue"],
            )
        if at(o, "packageDetail"):
            package = o["packageDetail"]
            self.write("parcels", order_id=self.order(number), carrier=package["carrierName"], tracking=package["trackingNumber"])

    def order_2026(self, number, o):
        total, to = at(o, "proceeds", "grandTotal"), at(o, "recipient")
        self.set(
            number, status=at(o, "fulfillment", "fulfillmentStatus"), total=at(total, "amount"), currency=at(total, "currencyCode"),
            buyer_name=at(o, "buyer", "buyerName"), buyer_email=at(o, "buyer", "buyerEmail"),
            buyer_company=at(o, "buyer", "buyerCompanyName"), purchase_order=at(o, "buyer", "buyerPurchaseOrderNumber"),
            drop_off=at(to, "deliveryPreference", "dropOffLocation"),
            instructions=at(to, "deliveryPreference", "addressInstruction"), raw=json.dumps(o),
        )
        delivery = at(to, "deliveryAddress")
        self.address(number, "recipient", delivery, at(delivery, "extendedFields"))
        for package in at(o, "packages") or []:
            self.address(number, "ship_from", package.get("shipFromAddress"), None)
            self.write("parcels", order_id=self.order(number), carrier=package.get("carrier"), tracking=package.get("trackingNumber"))
        for item in at(o, "orderItems") or []:
            product = item.get("product")
            self.write(
                "items", order_id=self.order(number), item_id=item["orderItemId"], title=at(product, "title"),
                price=at(product, "price", "unitPrice", "amount"), customized_url=at(product, "customization", "customizedUrl"),
                gift_message=at(item, "fulfillment", "packing", "giftOption", "giftMessage"),
                cancel_reason=at(item, "cancellation", "cancellationRequest", "cancelReason"),
            )
        for registration in at(o, "tax", "taxRegistrations") or []:
            self.write(
                "tax_registrations", order_id=self.order(number), entity=registration["entityType"],
                legal_name=registration.get("legalName"), number=registration.get("taxRegistrationNumber"),
                address=json.dumps(registration.get("taxRegistrationAddress")),
            )
        for payment in at(o, "payment", "paymentExecutions") or []:
            self.write(
                "payments", order_id=self.order(number), amount=at(payment, "paymentValue", "amount"),
                acquirer=payment.get("acquirerId"), authorization_code=payment.get("authorizationCode"),
                card_brand=payment.get("cardBrand"),
            )

    def report(self, text):
        """The order report; a line is an item. Returns a buyer's values and the others."""
        lines = csv.DictReader(text.splitlines(), delimiter="\t")
        buyers, others = set(), set()
        for number, line in zip(count(1), lines):
            self.order(line["order-id"])
            # Absent and empty differ, and both must stay what they are.
            self.write('"Report Lines"', line=number, **line)
            for column, value in line.items():
                (buyers if column in REPORT_COLUMNS else others).add(value)
        return buyers, others


REPORT_COLUMNS = [
    "buyer-email", "buyer-name", "buyer-phone-number", "recipient-name", "ship-address-1", "ship-address-2", "ship-address-3",
    "ship-city", "ship-state", "ship-postal-code", "ship-country", "ship-phone-number", "delivery-Instructions",
]
