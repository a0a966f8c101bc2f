-- Five orders. All people in them are invented.
INSERT INTO shop.customers VALUES
    (1, 'Ottilie Beispiel', 'x1y2z3@marketplace.invalid', '+49 30 5550101'),
    (2, 'Balthasar Muster', 'balthasar@shopper.invalid', '+49 40 5550102'),
    (3, 'Philippa Probe', 'p9q8r7@marketplace.invalid', NULL),
    (4, 'Leopold Erdacht', 'l5m6n7@marketplace.invalid', '+43 1 5550104');

INSERT INTO shop.orders VALUES
    (1, '303-0000001-0000001', 'amazon', 1, now() - interval '41 days', 'Zum Geburtstag, Deine Ottilie', 59.90),
    (2, '303-0000002-0000002', 'amazon', 2, now() - interval '33 days', NULL, 112.00),
    (3, '303-0000003-0000003', 'amazon', 3, now() - interval '29 days 12 hours', '', 18.50),
    (4, '303-0000004-0000004', 'amazon', 4, now() - interval '3 days', 'Frohes Fest', 7.25),
    (5, 'W-1001', 'web', 2, now() - interval '50 days', NULL, 240.00);

INSERT INTO shop.addresses (order_id, name, line1, line2, zip, city, country) VALUES
    (1, 'Ottilie Beispiel', 'Erfundene Gasse 7', '', '10999', 'Berlin', 'DE'),
    (2, 'Fa. Muster & Sohn', 'Luftschlossweg 12', 'Hof 3', '20999', 'Hamburg', 'DE'),
    (3, 'Philippa Probe', 'Nirgendstraße 1', NULL, '50999', 'Köln', 'DE'),
    (4, 'Leopold Erdacht', 'Wolkensteg 4', NULL, '1999', 'Wien', 'AT'),
    (5, 'Balthasar Muster', 'Luftschlossweg 12', NULL, '20999', 'Hamburg', 'DE');

INSERT INTO shop.payloads VALUES (1, 'v0', '{
  "AmazonOrderId": "303-0000001-0000001",
  "OrderStatus": "Shipped",
  "OrderTotal": {"CurrencyCode": "EUR", "Amount": "59.90"},
  "BuyerInfo": {"BuyerEmail": "x1y2z3@marketplace.invalid", "BuyerName": "Ottilie Beispiel"},
  "ShippingAddress": {
    "Name": "Ottilie Beispiel", "AddressLine1": "Erfundene Gasse 7", "AddressLine2": "", "City": "Berlin",
    "PostalCode": "10999", "CountryCode": "DE", "Phone": "+49 30 5550101",
    "ExtendedFields": {"StreetName": "Erfundene Gasse", "GeoCoordinates": {"Latitude": 52.500000001, "Longitude": 13.400000002}}
  },
  "DefaultShipFromLocationAddress": {"Name": "Lager Nord", "AddressLine1": "Hafenstraße 1", "City": "Bremen", "CountryCode": "DE"},
  "OrderItems": [{"ASIN": "B000000001", "Title": "Teekanne", "ItemPrice": {"CurrencyCode": "EUR", "Amount": "59.90"},
    "BuyerInfo": {"GiftMessageText": "Zum Geburtstag, Deine Ottilie", "GiftWrapLevel": "Classic"}}]
}'), (2, '2026-01-01', '{
  "orderId": "303-0000002-0000002",
  "buyer": {"buyerName": "Balthasar Muster", "buyerEmail": "k4k4k4@marketplace.invalid", "buyerPurchaseOrderNumber": "PO-4711-B"},
  "recipient": {"deliveryAddress": {"name": "Fa. Muster & Sohn", "addressLine1": "Luftschlossweg 12", "addressLine2": "Hof 3",
    "city": "Hamburg", "postalCode": "20999", "countryCode": "DE", "phone": "+49 40 5550102"},
    "deliveryPreference": {"addressInstruction": "Bei Balthasar im Hinterhof klingeln"}},
  "proceeds": {"grandTotal": {"amount": "112.00", "currencyCode": "EUR"}},
  "tax": {"taxRegistrations": [
    {"entityType": "BUYER", "legalName": "Muster & Sohn OHG", "taxRegistrationNumber": "DE999000111"},
    {"entityType": "MARKETPLACE", "legalName": "Marktplatz S.à r.l.", "taxRegistrationNumber": "LU99900011"}]},
  "packages": [{"trackingNumber": "TRK-000-112-B", "carrier": "Kurier",
    "shipFromAddress": {"name": "Lager Nord", "addressLine1": "Hafenstraße 1", "city": "Bremen", "countryCode": "DE"}}]
}');
